"""A table and its four faces: HTML, CSV, LaTeX and plain cells."""

import csv
import html
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Percent(NamedTuple):
    """An accuracy in [0, 1] with its 95 % interval where there is one; `mark` points to a note."""

    value: float
    low: float | None = None
    high: float | None = None
    mark: str = ""

    @staticmethod
    def of(row: dict[str, Any], mark: str = "") -> "Percent":
        """Of what evaluation.json says of an attack."""
        low, high = row.get("interval_95") or (None, None)
        return Percent(float(row["accuracy"]), low, high, mark)

    @property
    def text(self) -> str:
        """Per cent, to a tenth."""
        return f"{100 * self.value:.1f}{self.mark}"

    @property
    def interval(self) -> str:
        """`[93.2, 94.2]`, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"


Cell = str | int | float | Percent | None


class Table(NamedTuple):
    """Rows under headers, the first column naming the row; accuracies are per cent where read."""

    headers: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    notes: tuple[str, ...] = ()


class Html(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: str | None, **attributes: str | None) -> Html:
    """An element. What is not `Html` is escaped; an attribute of None is left out.

    Underscores in attributes stand for hyphens, `class_` for class.
    """
    inside = "".join(
        child if isinstance(child, Html) else html.escape(child)
        for child in children
        if child is not None
    )
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    void = name in ("img", "meta", "br", "link")
    return Html(f"<{name}{written}>" if void else f"<{name}{written}>{inside}</{name}>")


def plain(cell: Cell) -> str:
    """A cell for people, without its interval."""
    if cell is None:
        return "–"
    if isinstance(cell, Percent):
        return cell.text
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if 1e4 <= abs(cell) < 1e15 else f"{cell:.4g}"
    return cell


def _numeric(cell: Cell) -> bool:
    return isinstance(cell, int | float | Percent)


def as_html(table: Table) -> Html:
    """The table; numbers to the right, intervals small, the exact number in `data-value`."""
    numeric = [any(_numeric(row[i]) for row in table.rows) for i in range(len(table.headers))]

    def drawn(place: int, cell: Cell) -> Html:
        if place == 0:
            return tag("th", plain(cell), scope="row")
        exact = cell.value if isinstance(cell, Percent) else cell
        parts: list[str | None] = [plain(cell)]
        if isinstance(cell, Percent) and cell.interval:
            parts = [tag("b", cell.text), " ", tag("small", cell.interval)]
        return tag("td", *parts, class_="n" if numeric[place] else None,
                   data_value=repr(exact) if _numeric(cell) else None)  # fmt: skip

    head = tag("tr", *(tag("th", name, scope="col", class_="n" if numeric[i] else None)
                       for i, name in enumerate(table.headers)))  # fmt: skip
    body = [tag("tr", *(drawn(i, cell) for i, cell in enumerate(row))) for row in table.rows]
    drawn_table = tag("table", tag("thead", head), tag("tbody", *body))
    notes = [tag("p", note, class_="note") for note in table.notes]
    return Html(tag("div", drawn_table, class_="wide", tabindex="0") + "".join(notes))


def _spread(table: Table) -> Iterator[list[Any]]:
    """Header and rows with intervals and marks in columns of their own, numbers as recorded."""
    columns = [
        [row[i] for row in table.rows if isinstance(row[i], Percent)]
        for i in range(len(table.headers))
    ]
    ranged = [any(one.low is not None for one in column) for column in columns]  # type: ignore[union-attr]
    marked = [any(one.mark for one in column) for column in columns]  # type: ignore[union-attr]

    def wide(values: Sequence[Cell], header: bool) -> list[Any]:
        line: list[Any] = []
        for value, both, noted in zip(values, ranged, marked, strict=True):
            one = value if isinstance(value, Percent) else None
            # In the file accuracies are not per cent, and their headers do not say so.
            value = value.removesuffix(", %") if header and isinstance(value, str) else value
            line.append(one.value if one else "" if value is None else value)
            if both:
                line += (
                    [f"{value} low", f"{value} high"] if header
                    else [one.low, one.high] if one else ["", ""]
                )  # fmt: skip
            if noted:
                line.append(f"{value} mark" if header else one.mark if one else "")
        return line

    yield wide(table.headers, True)
    yield from (wide(row, False) for row in table.rows)


def as_csv(table: Table) -> str:
    """Every number in full, accuracies in [0, 1], intervals as `NAME low` and `NAME high`.

    What points to a note stands in `NAME mark`, where any row of the column has such a thing.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_spread(table))
    return text.getvalue()


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "–": "--", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "∞": r"$\infty$", "×": r"$\times$",
}  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def as_latex(table: Table) -> str:
    """A `tabular` with the rules of the package booktabs, its notes below the last rule."""
    numeric = [any(_numeric(row[i]) for row in table.rows) for i in range(len(table.headers))]

    def cell(value: Cell) -> str:
        text = escaped(plain(value))
        if isinstance(value, Percent) and value.interval:
            text += rf" {{\scriptsize {value.interval}}}"
        # A bracket that begins a cell would be taken for the option of the line before.
        return f"{{{text}}}" if text.startswith("[") else text

    lines = [
        r"% \usepackage{booktabs}; accuracies in per cent, 95 % intervals in brackets",
        rf"\begin{{tabular}}{{{''.join('r' if n else 'l' for n in numeric)}}}",
        r"\toprule",
        " & ".join(map(escaped, table.headers)) + r" \\",
        r"\midrule",
        *(" & ".join(map(cell, row)) + r" \\" for row in table.rows),
        r"\bottomrule",
        *(
            rf"\multicolumn{{{len(numeric)}}}{{p{{\linewidth}}}}{{\footnotesize "
            rf"{escaped(' '.join(note.split()))}}} \\"
            for note in table.notes
        ),
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"
