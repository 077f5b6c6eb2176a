"""The page: one HTML file that needs nothing beside it, and the files of each exhibit."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.pages.contents import sections
from experiments.pages.exhibit import Exhibit, Section
from experiments.pages.figures import render, themed
from experiments.pages.load import STUDIES, Record, Run, groups
from experiments.pages.tables import Cell, Html, Table, as_csv, as_html, as_latex, tag
from rain_jax.logs import Progress, provenance

_CSS = """
:root{color-scheme:light dark;--ink:#1f2933;--soft:#5b6772;--line:#d9dfe5;--page:#fff;
--panel:#f6f8fa;--link:#0b62a4;--flag:#a8430a}
@media(prefers-color-scheme:dark){:root{--ink:#d5dce3;--soft:#98a4af;--line:#343d46;
--page:#15191e;--panel:#1c2229;--link:#6db7ec;--flag:#f0a06a}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;color:var(--ink);background:var(--page);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
a{color:var(--link);text-decoration-thickness:1px;text-underline-offset:2px}
.frame{max-width:74rem;margin:0 auto;padding:1.5rem 1.25rem 4rem}
header{border-bottom:2px solid var(--ink);margin-bottom:1.25rem;padding-bottom:.75rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .35rem;letter-spacing:-.01em}
h2{font-size:1.35rem;margin:2.75rem 0 .4rem;padding-bottom:.25rem;
border-bottom:1px solid var(--line)}
h3{font-size:1.02rem;margin:1.6rem 0 .2rem}
p{margin:.3rem 0 .6rem;max-width:46rem}
header p,.intro,.caption,.note,figcaption{color:var(--soft)}
.caption,.note{font-size:.88rem}
.note{color:var(--flag);margin:.2rem 0}
nav ol{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.15rem 1rem}
nav{font-size:.92rem}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;
border-top:2px solid var(--ink);border-bottom:2px solid var(--ink)}
th,td{padding:.34rem .5rem;text-align:left;vertical-align:baseline}
th:first-child,td:first-child{padding-left:.3rem}
thead th{white-space:nowrap;font-weight:600;border-bottom:1px solid var(--ink);
vertical-align:bottom}
tbody tr+tr>*{border-top:1px solid var(--line)}
tbody th{font-weight:500}
tbody tr:hover>*{background:var(--panel)}
.n{text-align:right;white-space:nowrap}
td small{color:var(--soft);font-size:.8em}
th[aria-sort]{cursor:pointer}
th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}
figure{margin:.9rem 0 .4rem}
figure img{max-width:100%;height:auto;display:block}
.files{font-size:.82rem;color:var(--soft);margin:.1rem 0 .4rem}
details{margin:.4rem 0;border-left:3px solid var(--line);padding-left:.8rem}
summary{cursor:pointer;color:var(--link);font-size:.92rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;font-size:.88rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--panel);padding:.7rem;overflow-x:auto;font-size:.8rem;line-height:1.4;
max-height:28rem}
@media(min-width:68rem){.frame{display:grid;grid-template-columns:12.5rem minmax(0,1fr);
column-gap:2.5rem}header{grid-column:1/-1}nav{position:sticky;top:1rem;align-self:start}
nav ol{flex-direction:column}main>section:first-child h2{margin-top:0}}
@media print{nav{display:none}.frame{display:block;max-width:none}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""

# Without it the page says all the same; with it tables are sorted by a click on a header.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  const order = (a, b) => a !== "" && b !== "" && !isNaN(a) && !isNaN(b) ? Number(a) - Number(b)
    : a.localeCompare(b, undefined, {numeric: true});
  heads.forEach((head, i) => {
    const sort = () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => sign *
        order(value(a, i), value(b, i))));
    };
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    head.onclick = sort;
    head.onkeydown = (event) => { if (event.key === "Enter") sort(); };
  });
}
"""
# Rows of a table behind a figure from which on the page leaves them to the file.
LONG = 60


def write(runs: list[Run], out: Path) -> Path:
    """Writes `index.html` and the exhibits' files into the folder `out`; returns the page.

    Of each exhibit NAME.csv and NAME.tex, and NAME.png and NAME.svg where there is a figure.
    """
    parts = sections(runs, groups(runs))
    drawn: dict[str, str] = {}
    with Progress("report", sum(len(part.exhibits) for part in parts), unit="exhibit") as bar:
        for exhibit in (exhibit for part in parts for exhibit in part.exhibits):
            drawn[exhibit.slug] = _files(exhibit, out)
            bar.advance(1)
    page = out / "index.html"
    page.write_text(document(runs, parts, drawn), encoding="utf-8")
    return page


def _files(exhibit: Exhibit, out: Path) -> str:
    """Writes what an exhibit leaves beside the page; returns its figure for the page, as SVG."""
    (out / f"{exhibit.slug}.csv").write_text(as_csv(exhibit.table), encoding="utf-8")
    (out / f"{exhibit.slug}.tex").write_text(as_latex(exhibit.table), encoding="utf-8")
    if exhibit.draw is None:
        return ""
    png, svg = render(exhibit.draw, *exhibit.size)
    (out / f"{exhibit.slug}.png").write_bytes(png)
    (out / f"{exhibit.slug}.svg").write_text(svg, encoding="utf-8")
    return themed(svg)


def document(runs: list[Run], parts: list[Section], drawn: dict[str, str]) -> str:
    """The page. `drawn` is each exhibit's figure, or an empty text."""
    told = provenance()
    names = ", ".join(run.name for run in runs)
    last = [("missing", "What is not recorded"), ("provenance", "Provenance")]
    entries = [(part.slug, part.title) for part in parts] + last
    contents = [tag("li", tag("a", title, href=f"#{slug}")) for slug, title in entries]
    body = tag(
        "div",
        tag("header", tag("h1", "Robustness report"),
            tag("p", f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}: {names}. Written "
                f"{told['time'][:10]} from the folders of the runs; nothing was measured for it.")),
        tag("nav", tag("ol", *contents), aria_label="Contents"),
        tag("main", *(_section(part, drawn) for part in parts),
            _part(*last[0], *_missing(runs)),
            _part(*last[1], *_provenance(runs, told))),
        class_="frame",
    )  # fmt: skip
    head = tag(
        "head", tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Robustness report: {names}"), tag("style", Html(_CSS)),
    )  # fmt: skip
    script = tag("script", Html(_SCRIPT))
    return f"<!doctype html>\n{tag('html', head, tag('body', body, script), lang='en')}\n"


def _part(slug: str, title: str, *children: Html) -> Html:
    return tag("section", tag("h2", title), *children, id=slug)


def _section(part: Section, drawn: dict[str, str]) -> Html:
    shown = (inner for one in part.exhibits for inner in _exhibit(one, drawn[one.slug]))
    return _part(part.slug, part.title, tag("p", part.intro, class_="intro"), *shown)


def _exhibit(exhibit: Exhibit, svg: str) -> Iterator[Html]:
    yield tag("h3", exhibit.title, id=f"e-{exhibit.slug}")
    if exhibit.caption:
        yield tag("p", exhibit.caption, class_="caption")
    if exhibit.leading:
        yield as_html(exhibit.table)
    if svg:
        source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        width, _ = exhibit.size
        yield tag("figure", tag("img", src=source, alt=_alt(exhibit), width=f"{96 * width:.0f}"))
    if not exhibit.leading:
        rows = len(exhibit.table.rows)
        summary = tag("summary", f"The {rows:,} numbers")
        cut = exhibit.table._replace(rows=exhibit.table.rows[:LONG])
        rest = tag("p", f"The first {LONG}; {exhibit.slug}.csv has all.", class_="caption")
        yield tag("details", summary, as_html(cut), rest if rows > LONG else None)
    kinds = ("csv", "tex", "png", "svg") if svg else ("csv", "tex")
    links = [
        inner for place, kind in enumerate(kinds)
        for inner in (" · " if place else None,
                      tag("a", kind.upper(), href=f"{exhibit.slug}.{kind}"))
    ]  # fmt: skip
    yield tag("p", f"{exhibit.slug}: ", *links, class_="files")


def _alt(exhibit: Exhibit) -> str:
    """What the figure says to who cannot see it: what is drawn, and where the numbers are."""
    where = "above" if exhibit.leading else "below"
    headers = ", ".join(exhibit.table.headers)
    return f"Figure: {exhibit.title}. {exhibit.caption} Its numbers are {where}: {headers}."


def _missing(runs: list[Run]) -> Iterator[Html]:
    yield tag("p", "Nothing on this page stands in for these.", class_="intro")
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        studies = [study for study in STUDIES if study not in run.studies]
        rows.append((run.name, "; ".join(run.missing) or None, ", ".join(studies) or None))
    yield as_html(Table(("run", "not there", "studies not made"), rows))


def _provenance(runs: list[Run], told: Record) -> Iterator[Html]:
    yield tag("p", "What it takes to run this again.", class_="intro")
    for run in runs:
        record = run.evaluation or {}
        about = {"folder": str(run.place)}
        about |= {key: record[key] for key in ("seed", "step", "model") if key in record}
        config = [] if run.config is None else [
            tag("details", tag("summary", "config.json"),
                tag("pre", json.dumps(run.config, indent=2)))
        ]  # fmt: skip
        yield tag(
            "details", tag("summary", run.name), _list(about),
            *_told("Evaluation", record.get("provenance")), *_told("Training", run.training),
            *(part for study, held in run.studies.items()
              for part in _told(study, held.get("provenance"))),
            *config,
        )  # fmt: skip
    yield tag("details", tag("summary", "this page"), _list(told))


def _told(title: str, record: Any) -> list[Html]:
    return [tag("h3", title), _list(record)] if isinstance(record, dict) else []


def _list(record: Record) -> Html:
    inner = []
    for key, value in record.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {held}" for name, held in value.items())
        inner += [tag("dt", key), tag("dd", "not recorded" if value is None else str(value))]
    return tag("dl", *inner)
