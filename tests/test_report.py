"""The report: what is recorded and nothing else, in four kinds of files, and readable."""

import csv
import html.parser
import io
import json
import os
import re
import shutil
from pathlib import Path

import browser
import numpy as np
import pytest

from experiments import report
from experiments.pages import contents, figures, images, load, tables
from experiments.pages.tables import Percent, Table
from experiments.sweeping.told import printed
from rain_jax.checks import UsageError
from rain_jax.evaluation import Proportion

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
AWKWARD = "a<b>&_50%"


def counted(right, of):
    value = Proportion(right, of)
    return {"right": right, "of": of, "accuracy": value.value, "interval_95": list(value.interval)}


def row(right, of, **more):
    told = {"attacked": of, "largest_distance": 0.1, "seconds": 1.5}
    return {**counted(right, of), **told, **more}


def record_of(images=6, radius=0.1, **more):
    """Of a cascade: 5 of 6 right, then 4, then 3 and a check at a larger radius."""
    return {
        "model": "adversarial", "step": 10, "seed": 3, "images": images, "data": "digits",
        "threat": {"norm": "linf", "radius": radius, "radius_in_255": 255 * radius},
        "clean": row(5, images),
        "attacks": {
            "pgd": row(4, images, settings={"steps": 5}, mean_steps=2.5),
            "square": row(3, images, queries=23456, passes={"forward": 70}),
            "far": row(0, images, largest_distance=0.5, through="classifier"),
        },
        "cascade": True, "worst_case": row(3, images), "draws": 1, "eight_bit": True,
        "distances": {"fmn": {"radius": [0.0, 0.1, 0.2], "accuracy": [0.8, 0.5, 0.1]}},
        "provenance": {"device": "toy", "devices": 2, "git": {"commit": "abc", "dirty": False}},
    }  # fmt: skip


def write_run(folder, record, **files):
    """A run that holds this evaluation, six verdicts for each column, and two images."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": {"name": "digits"}}))
    (folder / "provenance.json").write_text(json.dumps({"command": f"train {AWKWARD}"}))
    lines = [{"step": s, "kind": "train", "loss": 2.0 / s, "accuracy": s / 10} for s in range(1, 4)]
    lines.append({"step": 3, "kind": "validation", "clean": 0.8, "robust": "NaN"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if record is not None:
        (folder / "evaluation.json").write_text(json.dumps(record))
    # Image 0 is wrong as it is; pgd breaks 1, square 2 by more than pgd could, far all of them.
    margins = {
        "clean": [1, -3, -3, -3, -3, -3], "pgd": [2, 1, -1, -2, -2, -2],
        "square": [1, -1, 1, -1, -2, -2], "far": [9, 9, 9, 9, 9, 9],
    }  # fmt: skip
    arrays = {}
    for column, margin in margins.items():
        wrong = np.array(margin) > 0
        arrays |= {
            f"{column}/index": np.arange(6), f"{column}/label": np.array([0, 1, 2, 0, 1, 2]),
            f"{column}/margin": np.array(margin, float), f"{column}/right": ~wrong,
            f"{column}/prediction": np.where(wrong, 3, [0, 1, 2, 0, 1, 2]),
            f"{column}/allowed": np.ones(6, bool),
            f"{column}/distance": np.full(6, 0.5 if column == "far" else 0.1),
        }  # fmt: skip
    np.savez(folder / "verdicts.npz", **arrays)
    clean = np.full((2, 8, 8, 1), 0.5, np.float32)
    classes = np.array([0, 1])
    np.savez(
        folder / "examples.npz", adversarial_clean=clean, adversarial_adversarial=clean + 0.1,
        adversarial_label=classes, adversarial_clean_prediction=classes,
        adversarial_adversarial_prediction=classes[::-1],
    )  # fmt: skip
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


def shown(*folders):
    """What a report of these runs shows, by slug."""
    runs = load.load(folders)
    parts = contents.sections(runs, load.groups(runs))
    return {exhibit.slug: exhibit for part in parts for exhibit in part.exhibits}


class Parsed(html.parser.HTMLParser):
    """A page as a tree would have it: what is open, what was met, which tables there are."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.sources, self.links, self.alts = [], [], [], [], []
        self.cells, self.text = [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        if "id" in given:
            self.ids.append(given["id"])
        self.sources += [given[key] for key in ("src", "srcset", "data", "poster") if key in given]
        self.sources += [given["href"]] if name == "link" else []
        self.links += [given["href"]] if name == "a" else []
        self.alts += [given.get("alt")] if name == "img" else []
        if "data-value" in given:
            self.cells.append(given["data-value"])
        if name not in ("img", "meta", "br", "link"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of a run with everything, and of one without an evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    ladder = {"valid": True, "checks": [], "sweep": [
        {"draws": d, "steps": s, "accuracy": 1 / (d * s)} for d in (1, 5) for s in (1, 2)
    ]}  # fmt: skip
    whole = write_run(folder / AWKWARD, {**record_of(), "ladder": ladder})
    bare = write_run(folder / "bare", None)
    for file in ("verdicts.npz", "examples.npz"):
        (bare / file).unlink()
    out = folder / "report"
    report.main([str(whole), str(bare), f"--out={out}"])
    return out, (out / "index.html").read_text()


# --- The page ---------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_nothing_beside_it(written):
    out, text = written
    parsed = Parsed(text)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert parsed.sources
    assert all(source.startswith("data:image/") for source in parsed.sources)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    for link in parsed.links:
        target = link[1:] in parsed.ids if link.startswith("#") else (out / link).is_file()
        assert target, link
    assert all(alt and len(alt) > 20 for alt in parsed.alts)
    assert "Results" in parsed.text


def test_names_are_escaped_wherever_they_stand(written):
    out, text = written
    assert AWKWARD not in text
    assert "a&lt;b&gt;&amp;_50%" in text
    assert AWKWARD in Parsed(text).text
    latex = (out / "results.tex").read_text()
    assert r"a\textless{}b\textgreater{}\&\_50\%" in latex


def test_every_exhibit_lies_beside_the_page_in_four_kinds(written):
    out, _ = written
    drawn = {path.stem for path in out.glob("*.png")}
    assert {path.stem for path in out.glob("*.svg")} == drawn
    every = {path.stem for path in out.glob("*.csv")}
    assert {path.stem for path in out.glob("*.tex")} == every
    assert every - drawn == {"results"}  # of one run its figure is that of the attacks
    safe = "a-b--_50-"
    wanted = {"attacks", "radius", f"budget-{safe}", f"budget-{safe}-draws", "learning",
              f"gallery-{safe}", f"spectra-{safe}", f"confusion-{safe}", "cost"}  # fmt: skip
    assert drawn == wanted
    for path in out.glob("*.svg"):
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE.*?>|<metadata>.*?</metadata>',
                                    "", path.read_text(), flags=re.S)  # fmt: skip


def test_a_run_without_evaluation_is_shown_by_its_learning_curve_alone(written):
    out, text = written
    assert "No accuracies are recorded of bare." in Parsed(text).text
    names = {path.name for path in out.iterdir() if "bare" in path.read_bytes().decode("latin1")}
    assert names == {
        "index.html",
        "learning.csv",
        "learning.tex",
        "learning.png",
        "learning.svg",
    } - ({"learning.png"})


def test_provenance_is_on_the_page(written):
    text = Parsed(written[1]).text
    for told in ("commit abc", f"train {AWKWARD}", "2 × toy", '"name": "digits"', "seed"):
        assert told in text


# --- Numbers ----------------------------------------------------------------------------------


def test_of_several_evaluations_the_latest_or_the_given_is_shown_by_name(tmp_path):
    run = write_run(tmp_path / "run", None)
    for number, name in enumerate(("pgd-6", "square-6")):
        place = write_run(tmp_path / name, record_of())
        (run / "evaluations").mkdir(exist_ok=True)
        place.rename(run / "evaluations" / name)
        os.utime(run / "evaluations" / name / "evaluation.json", (number, number))
    (notes,) = (shown(run)[slug].table.notes for slug in shown(run) if slug.startswith("results"))
    assert "run: evaluation square-6; the run has others: pgd-6." in notes
    given = shown(run / "evaluations" / "pgd-6")
    (notes,) = (given[slug].table.notes for slug in given if slug.startswith("results"))
    assert "pgd-6: evaluation pgd-6; the run has others: square-6." in notes


@pytest.mark.parametrize("file", ["mnist/evaluation.json", "cifar10_nn_jpeg/ladder.json"])
def test_every_number_of_a_real_record_is_in_the_tables_as_it_was_recorded(tmp_path, file):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(RESULTS / file, folder / "evaluation.json")
    record = json.loads((RESULTS / file).read_text())
    found = shown(folder)
    (line,) = csv.DictReader(io.StringIO(tables.as_csv(found["results"].table)))
    for column, told in ("clean", record["clean"]), ("worst case", record["worst_case"]):
        assert float(line[column]) == told["accuracy"]
        assert [float(line[f"{column} {end}"]) for end in ("low", "high")] == told["interval_95"]
    table = found["attacks"].table
    rows = {line["attack"]: line for line in csv.DictReader(io.StringIO(tables.as_csv(table)))}
    wanted = {"clean": record["clean"], **record["attacks"]}
    assert list(rows) == list(wanted)
    cells = Parsed(tables.as_html(table)).cells
    latex = tables.as_latex(table)
    for (title, told), cell in zip(wanted.items(), cells, strict=True):
        assert float(rows[title]["run"]) == float(cell) == told["accuracy"]
        low, high = (100 * end for end in told["interval_95"])
        assert f"{100 * told['accuracy']:.1f}" in latex
        assert rf"{{\scriptsize [{low:.1f}, {high:.1f}]}}" in latex


def test_a_cascade_says_so_and_checks_are_no_part_of_the_worst_case(tmp_path):
    found = shown(write_run(tmp_path / "run", record_of()))
    table = found["attacks"].table
    assert [line[0] for line in table.rows] == ["clean", "pgd", "+ square", "far"]
    assert [line[2].mark for line in table.rows] == ["", "", "", "†"]
    assert "no part of the worst case" in table.notes[0]
    assert found["results"].table.rows[0][3] == Percent.of(record_of()["worst_case"])


def test_confusion_is_of_the_worst_image_within_the_threat(tmp_path):
    (run,) = load.load([write_run(tmp_path / "run", record_of())])
    seen = images.fallen(run)
    np.testing.assert_array_equal(seen.clean, [3, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(seen.attacked, [3, 3, 3, 0, 1, 2])
    assert np.sum(seen.stands) == run.worst["right"] == 3
    (exhibit,) = images.confusion(run)
    assert ("attacked", "1", "3", 1) in exhibit.table.rows
    assert sum(line[3] for line in exhibit.table.rows) == 12


def test_an_image_that_broke_the_rules_leaves_its_attack_what_it_is(tmp_path):
    """A part of the worst case, whose other images it broke."""
    record = record_of()
    record["attacks"]["pgd"] |= {"outside_the_threat": 1, "largest_distance": 0.7}
    folder = write_run(tmp_path / "run", record)
    arrays = dict(np.load(folder / "verdicts.npz"))
    arrays["pgd/allowed"][5], arrays["pgd/distance"][5] = False, 0.7
    np.savez(folder / "verdicts.npz", **arrays)
    (run,) = load.load([folder])
    np.testing.assert_array_equal(images.fallen(run).attacked, [3, 3, 3, 0, 1, 2])
    marks = {line[0]: line[2].mark for line in shown(folder)["attacks"].table.rows}
    assert marks == {"clean": "", "pgd": "!", "+ square": "!", "far": "†!"}


def test_a_judged_worst_case_goes_before_the_single_attacks(tmp_path):
    folder = write_run(tmp_path / "run", record_of())
    arrays = dict(np.load(folder / "verdicts.npz"))
    arrays |= {f"worst case/{k.split('/')[1]}": v for k, v in arrays.items() if "pgd/" in k}
    np.savez(folder / "verdicts.npz", **arrays)
    (run,) = load.load([folder])
    np.testing.assert_array_equal(images.fallen(run).attacked, [3, 3, 2, 0, 1, 2])
    (exhibit,) = images.confusion(run)
    assert "4 of 6" in exhibit.caption
    assert "The headline counts 3 of 6." in exhibit.caption


def test_cost_has_queries_passes_and_seconds_where_recorded(tmp_path):
    table = shown(write_run(tmp_path / "run", record_of()))["cost"].table
    headers = ("run", "attack", "images", "mean steps", "queries", "passes forward", "seconds",
               "device")  # fmt: skip
    assert table.headers == headers
    assert table.rows[2] == ("run", "+ square", 6, None, 23456, 70, 1.5, "2 × toy")
    assert table.rows[4][1] == "fmn (distances)"


def test_curves_are_the_recorded_ones(tmp_path):
    sweep = [{"draws": d, "steps": s, "accuracy": 1 / (d * s)} for d in (1, 5) for s in (2, 1)]
    record = {**record_of(), "ladder": {"valid": True, "checks": [], "sweep": sweep}}
    found = shown(write_run(tmp_path / "run", record))
    assert found["radius"].table.rows[1] == ("run", "fmn", 0.1, Percent(0.5))
    assert found["budget-run"].table.rows[2] == (5, 2, Percent(0.1))
    learning = found["learning"].table
    assert learning.rows[1] == ("run", 2, "train", 1.0, 0.2, None, None)
    assert learning.rows[3][:3] == ("run", 3, "validation")
    assert np.isnan(learning.rows[3][6])


def test_a_robust_accuracy_that_was_never_measured_is_not_shown(tmp_path):
    folder = write_run(tmp_path / "run", record_of())
    sections = {"data": {"name": "digits"}, "validation": {"attack": None}}
    (folder / "config.json").write_text(json.dumps(sections))
    learning = shown(folder)["learning"]
    assert learning.table.headers == ("run", "step", "kind", "loss", "accuracy", "clean")
    assert "Those of run were not." in learning.caption


def test_a_gallery_that_leaves_the_threat_says_so(tmp_path):
    within, beyond = (
        shown(write_run(tmp_path / name, record_of(radius=radius)))[f"gallery-{name}"]
        for name, radius in (("a", 0.1), ("b", 0.05))
    )
    assert "further" not in within.caption
    assert "goes further than the radius" in beyond.caption
    assert "±0.1." in within.caption
    assert within.table.rows[0][1:4] == ("0", "0", "1")
    assert within.table.rows[0][4:] == pytest.approx((0.1, 0.8), rel=1e-5)


def test_studies_of_other_commands_are_shown_and_unknown_ones_by_their_accuracies(tmp_path):
    certified = [{"radius": r, **counted(3 - r, 6)} for r in (0, 1)]
    sigmas = [{"sigma": sigma, "certified": certified} for sigma in (1, 2)]
    certify = {"draws": 1000, "alpha": 0.001, "sigmas": sigmas}
    corruptions = {"runs": {"run": {
        "clean": counted(5, 6), "mean_error": 0.4, "mce": None,
        "families": {"fog": {"1": counted(4, 6), "5": counted(2, 6)}, "snow": {"1": counted(3, 6)}},
    }}}  # fmt: skip
    sweep = {"cells": [{"radius": r, "seed": s, "accuracy": 0.5} for r in (0, 1) for s in (0, 1)]}
    low = {"cutoff": [0.5, 1.0], "classifier": [counted(1, 6), counted(2, 6)]}
    spectrum = {"cycles_per_pixel": [0, 0.5], "log10_power": [1, 2], "standard_error": [0.1, 0.1]}
    frequencies = {"images": 6, "spectra": {"clean": spectrum}, "low_pass": low}
    folder = write_run(tmp_path / "run", record_of(), certify=certify, corruptions=corruptions,
                       sweep=sweep, frequencies=frequencies)  # fmt: skip
    found = shown(folder)
    assert found["certify-run"].table.rows[1] == (1, 1, Percent.of(counted(2, 6)))
    fog = found["corruptions-run"].table
    assert fog.headers == ("family", "0", "1", "5")
    assert fog.rows[0] == ("clean", Percent.of(counted(5, 6)), None, None)
    assert fog.rows[2] == ("snow", None, Percent.of(counted(3, 6)), None)
    assert found["sweep-run"].table.headers == ("radius", "seed", "accuracy, %")
    assert len(found["sweep-run"].table.rows) == 4
    assert found["frequencies-run"].table.rows[1] == ("clean", 0.5, 2)
    assert "mean error 40 %." in found["corruptions-run"].caption
    assert found["low-pass-run"].table.rows[0][:1] == (0.5,)


# --- What may not stand side by side, and what may not be shown -----------------------------------


def test_runs_of_another_threat_or_other_images_have_tables_of_their_own(tmp_path):
    records = {"a": record_of(), "b": record_of(), "c": record_of(radius=0.2)}
    records["d"] = {**record_of(), "images": 5}
    runs = load.load([write_run(tmp_path / name, record) for name, record in records.items()])
    groups = load.groups(runs)
    assert [[run.name for run in group.runs] for group in groups] == [["a", "b"], ["c"], ["d"]]
    assert len({group.title for group in groups}) == 3


def test_runs_that_differ_in_a_number_are_a_curve_and_seeds_are_one_point(tmp_path):
    def run(folder, clean, worst, **method):
        record = {**record_of(), "model": method["name"], "cascade": False}
        record |= {"clean": row(clean, 6), "worst_case": row(worst, 6)}
        seed = method.pop("seed", 0)
        config = {"seed": seed, "method": method, "evaluation": {"batch_size": clean}}
        config |= {"data": {"name": "digits", "data_dir": folder}}
        config |= {"checkpoints": {"every_epochs": clean}, "parallel": {"devices": worst}}
        return write_run(tmp_path / folder, record, config=config)

    folders = [
        run("c9", 6, 1, name="sense", threshold=0.9),
        run("c5", 5, 3, name="sense", threshold=0.5),
        run("c5b", 4, 2, name="sense", threshold=0.5, seed=1),
        run("at", 4, 3, name="adversarial"),
        run("mixed", 3, 3, name="sense", threshold=0.5, form="trade"),
    ]
    exhibit = shown(*folders)["tradeoff"]
    told = [(*r[:3], r[3].text, r[3].interval, r[4].text) for r in exhibit.table.rows]
    assert told == [
        ("sense (c5)", "method.threshold = 0.5", 2, "75.0", "[66.7, 83.3]", "41.7"),
        ("sense (c5)", "method.threshold = 0.9", 1, "100.0", "[61.0, 100.0]", "16.7"),
        ("adversarial", None, 1, "66.7", "[30.0, 90.3]", "50.0"),
        ("sense (mixed)", None, 1, "50.0", "[18.8, 81.2]", "50.0"),
    ]
    assert "tradeoff" not in shown(*folders[:2])


def test_runs_that_were_attacked_otherwise_are_no_seeds_of_each_other(tmp_path):
    folders = []
    for steps in (1, 40, 40):
        record = record_of()
        record["attacks"]["pgd"]["settings"] = {"steps": steps}
        config = {"seed": len(folders), "method": {"name": "adversarial"}}
        folders.append(write_run(tmp_path / str(len(folders)), record, config=config))
    rows = shown(*folders)["tradeoff"].table.rows
    assert [row[2] for row in rows] == [1, 2]


def test_where_two_numbers_vary_no_curve_is_drawn(tmp_path):
    folders = []
    for place, (beta, rate) in enumerate([(1, 0.1), (6, 0.1), (6, 0.2), (6, 0.2)]):
        config = {"seed": place, "method": {"beta": beta}, "schedule": {"peak": rate}}
        folders.append(write_run(tmp_path / str(place), record_of(), config=config))
    rows = shown(*folders)["tradeoff"].table.rows
    assert [(r[0], r[1], r[2]) for r in rows] == [
        ("adversarial (0)", None, 1), ("adversarial (1)", None, 1), ("adversarial (2)", None, 2)
    ]  # fmt: skip


def test_one_name_with_two_settings_is_marked(tmp_path):
    other = record_of()
    other["attacks"]["pgd"]["settings"] = {"steps": 50}
    found = shown(write_run(tmp_path / "a", record_of()), write_run(tmp_path / "b", other))
    marks = {line[0]: line[2].mark for line in found["attacks"].table.rows}
    assert marks == {"clean": "", "pgd": "‡", "+ square": "", "far": "†"}
    assert "‡ pgd has not the same settings in all runs." in found["attacks"].table.notes


def test_a_withheld_number_is_not_shown_and_a_flagged_one_is_marked(tmp_path):
    checks = [{"name": "far falls", "passed": False, "told": "9 % left"}]
    ladder = {"valid": False, "checks": checks, "sweep": []}
    withheld = {**record_of(), "worst_case": None, "ladder": ladder}
    flagged = {**record_of(), "checks": checks}
    flagged["attacks"]["pgd"]["outside_the_threat"] = 2
    found = shown(write_run(tmp_path / "a", withheld), write_run(tmp_path / "b", flagged))
    table = found["results"].table
    assert table.rows[0][3] == "withheld †"
    assert table.rows[1][3].mark == "†"
    assert all("far falls (9 % left)" in note for note in table.notes)
    assert "no worst case is given" in table.notes[0]
    assert not any("no checks" in note for note in table.notes)
    assert "pgd: 2 images broke the rules" in table.notes[1]
    # Nor does the figure draw it.
    assert "withheld" in tables.as_csv(table)


def test_a_number_that_nothing_was_held_against_for_want_of_looking_is_marked(tmp_path):
    found = shown(write_run(tmp_path / "a", {**record_of(), "checks": [], "flagged": None}))
    table = found["results"].table
    assert table.rows[0][3].mark == "†"
    assert "no checks were made" in table.notes[0]


def test_a_flag_stands_beside_every_number_it_is_about_in_every_face(tmp_path):
    checks = [{"name": "far falls", "passed": False, "told": "9 % left"}]
    sound, flagged = record_of(), {**record_of(), "checks": checks}
    found = shown(write_run(tmp_path / "a", sound), write_run(tmp_path / "b", flagged))
    lines = csv.DictReader(io.StringIO(tables.as_csv(found["attacks"].table)))
    marks = {line["attack"]: line["b mark"] for line in lines}
    assert "!" not in marks["clean"]
    assert all("!" in marks[title] for title in ("+ square", "pgd"))
    assert "a mark" not in lines.fieldnames or "!" not in str([line["a mark"] for line in lines])
    (one, other) = csv.DictReader(io.StringIO(tables.as_csv(found["results"].table)))
    assert (one["worst case mark"], other["worst case mark"]) == ("", "†")
    radii = csv.DictReader(io.StringIO(tables.as_csv(found["radius"].table)))
    assert {(line["run"], line["accuracy mark"]) for line in radii} == {("a", ""), ("b", "!")}
    for name in "attacks", "results", "radius":
        assert any("b: does not hold: far falls" in note for note in found[name].table.notes)
        shown_ = [x for x in tables.as_latex(found[name].table).splitlines() if x[:1] != "%"]
        assert any("far falls" in line for line in shown_)


def sweep_of(passed=True):
    """Three radii, two seeds, two draws; more draws and larger radii leave less."""
    cells = [
        {"radius": radius, "seed": seed, "draws": draws, "run": "r",
         **counted(round(90 - 200 * radius - 5 * draws + seed), 100), "clean": counted(95, 100)}
        for radius in (0.1, 0.2, 0.3) for seed in (0, 1) for draws in (1, 4)
    ]  # fmt: skip
    checks = [{"name": "more radius does not weaken", "passed": passed, "told": "50 % at 0.3"}]
    return {"cells": cells, "checks": checks, "flagged": not passed}


def test_a_sweep_is_drawn_over_its_radii_and_over_its_draws(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures, "plotted", lambda lines, x, y, marked=None: drawn.setdefault(x, lines)
    )
    found = shown(write_run(tmp_path / "a", record_of(), sweep=sweep_of()))
    assert {"sweep-a", "sweep-a-draws"} <= set(found)
    over = drawn["radius"]
    # Seeds are one line, and what does not vary is not told.
    assert [line.label for line in over] == ["draws 1", "draws 4"]
    assert over[0].x == [0.1, 0.2, 0.3]
    assert over[0].y == pytest.approx([65.5, 45.5, 25.5])
    assert (over[0].low, over[0].high) == ((65.0, 45.0, 25.0), (66.0, 46.0, 26.0))
    assert [line.label for line in drawn["draws"]] == ["radius 0.1", "radius 0.2", "radius 0.3"]
    assert drawn["draws"][2].y == pytest.approx([25.5, 10.5])
    assert not found["sweep-a"].table.notes


def test_lines_too_many_to_be_told_apart_are_in_the_table_alone(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures, "plotted", lambda lines, x, y, marked=None: drawn.setdefault(x, lines)
    )
    cells = [
        {"radius": r / 100, "draws": d, **counted(90 - r, 100)} for r in range(16) for d in (1, 2)
    ]
    found = shown(write_run(tmp_path / "a", record_of(), sweep={"cells": cells}))
    labels = [line.label for line in drawn["draws"]]
    assert len(set(labels)) == len(figures.SERIES)
    assert (labels[0], labels[-1]) == ("radius 0", "radius 0.15")
    assert "8 more lines are in the table" in found["sweep-a-draws"].caption


def test_a_flagged_sweep_is_marked_on_the_page_and_where_it_is_printed(tmp_path):
    record = sweep_of(passed=False)
    table = shown(write_run(tmp_path / "a", record_of(), sweep=record))["sweep-a"].table
    assert all(row[-1].mark == "!" for row in table.rows)
    assert "50 % at 0.3" in table.notes[0]
    axes = {"axes": {"radius": [0.1, 0.2, 0.3], "draws": [1, 4], "seed": [0, 1]}}
    assert printed({**record, **axes}).count(" !") == 12
    assert " !" not in printed({**sweep_of(), **axes})


def test_a_run_that_was_not_attacked_has_no_worst_case(tmp_path):
    found = shown(write_run(tmp_path / "run", {**record_of(), "attacks": {}}))
    assert found["results"].table.rows[0][3:5] == ("not attacked", "none")
    assert "attacks" not in found


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = load.load([write_run(tmp_path / x / "run", record_of()) for x in ("a", "b")])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    others = [write_run(tmp_path / name, record_of()) for name in ("c-d", "c d")]
    assert "gallery-c-d-2" in shown(*others)


def broken(folder, file, text):
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    "file, text, told",
    [
        ("evaluation.json", "{", "evaluation.json: damaged"),
        ("evaluation.json", '{"clean": {}}', "evaluation.json: threat"),
        ("config.json", "[]", "config.json: expected an object"),
        ("metrics.jsonl", "x\n", "metrics.jsonl:1"),
        ("metrics.jsonl", '{"step": 1, "kind": "train", "loss": "x"}\n', "metrics.jsonl: damaged"),
        ("verdicts.npz", b"PK\x03\x04", "verdicts.npz: damaged"),
        ("examples.npz", b"", "examples.npz: damaged"),
        ("certify.json", "{}", "certify.json: damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, text, told):
    folder = write_run(tmp_path / "run", record_of())
    broken(folder, file, text)
    with pytest.raises(UsageError, match=re.escape(told)) as error:
        shown(folder)
    assert "\n" not in str(error.value)


def test_numbers_that_contradict_each_other_are_refused(tmp_path):
    record = record_of()
    record["attacks"]["pgd"]["accuracy"] = 0.9
    with pytest.raises(UsageError, match=r"attacks\.pgd: 4 of 6 right, accuracy 0.9"):
        load.load([write_run(tmp_path / "run", record)])


def test_what_is_no_run_or_no_place_for_a_report_is_refused(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", record_of())
    with pytest.raises(UsageError, match="no such folder"):
        load.load([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="holds none of its files"):
        (tmp_path / "empty").mkdir()
        load.load([tmp_path / "empty"])
    with pytest.raises(UsageError, match="given twice"):
        load.load([run, tmp_path / "run" / ".." / "run"])
    with pytest.raises(UsageError, match="is the folder of a run"):
        report.main([str(run), f"--out={run}"])
    with pytest.raises(UsageError, match="cannot be written"):
        report.main([str(run), f"--out={run / 'config.json' / 'there'}"])


def test_half_a_last_line_is_no_damage_and_missing_files_are_said(tmp_path):
    folder = write_run(tmp_path / "run", record_of())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')
    (folder / "examples.npz").unlink()
    (run,) = load.load([folder])
    assert len(run.metrics) == 4
    assert run.missing == ("examples.npz (the images of the gallery)",)


# --- Tables -----------------------------------------------------------------------------------


def test_latex_escapes_what_it_would_take_for_commands():
    table = Table(("x_1", "%"), [(r"a\b{c}$#&~^", Percent(0.5, 0.25, 0.75)), ("[d]", None)])
    latex = tables.as_latex(table)
    escaped = r"a\textbackslash{}b\{c\}\$\#\&\textasciitilde{}\textasciicircum{}"
    assert rf"{escaped} & 50.0 {{\scriptsize [25.0, 75.0]}} \\" in latex
    assert r"{[d]} & -- \\" in latex
    assert r"\begin{tabular}{lr}" in latex
    assert r"x\_1 & \% \\" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1


def test_csv_quotes_and_spreads_intervals():
    table = Table(("name", "clean, %"), [('a,"b"', Percent(1 / 3, 0.2, 0.5)), ("c", None)])
    lines = list(csv.reader(io.StringIO(tables.as_csv(table))))
    assert lines[0] == ["name", "clean", "clean low", "clean high"]
    assert lines[1][0] == 'a,"b"'
    assert [float(cell) for cell in lines[1][1:]] == [1 / 3, 0.2, 0.5]
    assert lines[2] == ["c", "", "", ""]


# --- In a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    found = browser.found()
    if found is None:
        pytest.skip("no Chromium on the path, and none named by the variable CHROMIUM")
    with browser.browser(found) as running:
        yield running


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_page(written, chromium, tmp_path, width, dark):
    out, _ = written
    chromium.events.clear()
    chromium.open(out / "index.html", width=width, dark=dark)
    chromium.screenshot(tmp_path / "page.png")
    from PIL import Image

    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("L"), float) / 255
    # Paper or night, with something on it in every window's height but the last.
    paper = np.median(pixels)
    assert paper < 0.2 if dark else paper > 0.9
    for top in range(0, pixels.shape[0] - 900, 900):
        assert np.mean(np.abs(pixels[top : top + 900] - paper) > 0.3) > 0.003
    images = "[...document.images].map((i) => i.complete && i.naturalWidth > 100)"
    drawn = chromium.evaluate(images)
    assert drawn
    assert all(drawn)
    # Wide tables scroll within themselves; the page does not.
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    requested = [
        event["params"]["request"]["url"]
        for event in chromium.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in requested)
    bad = ("Runtime.exceptionThrown", "Log.entryAdded")
    assert not [event for event in chromium.events if event.get("method") in bad]


def test_a_click_on_a_header_sorts_by_number(written, chromium):
    chromium.open(written[0] / "index.html")
    column = (
        "[...document.querySelectorAll('#attacks tbody td:last-child')]"
        ".map((cell) => Number(cell.dataset.value))"
    )
    chromium.evaluate("document.querySelector('#attacks thead th:last-child').click()")
    first = chromium.evaluate(column)
    chromium.evaluate("document.querySelector('#attacks thead th:last-child').click()")
    assert first == sorted(first, reverse=True) != chromium.evaluate(column) == sorted(first)
