"""How things are drawn: one look for all figures, as PNG, as SVG, and as SVG that knows the dark.

Every drawing is a function of an empty figure. Colours are those of Okabe and Ito, which can be
told apart by the colour-blind, and lines have markers besides.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

INK, FAINT = "#1f2933", "#c3ccd5"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b5ea7", "#6b7280")
# The same in front of a dark page.
DARK = {
    INK: "#d5dce3", FAINT: "#47525d", "#0072b2": "#5ab0e6", "#d55e00": "#f08a4b",
    "#009e73": "#3cc79b", "#cc79a7": "#e3a5cb", "#b8860b": "#e6b84a", "#56b4e9": "#9ad4f5",
    "#7b5ea7": "#b79ad6", "#6b7280": "#a3abb5",
}  # fmt: skip
MARKERS = "os^DvPX*"
# Points of a curve from which on markers only blacken it.
MANY = 40
_STYLE: Any = {
    "font.size": 9, "axes.labelsize": 9, "axes.titlesize": 9, "legend.fontsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": FAINT, "grid.linewidth": 0.5, "axes.axisbelow": True, "lines.linewidth": 1.4,
    "lines.markersize": 4, "legend.frameon": False, "image.cmap": "cividis",
    "svg.fonttype": "none", "svg.hashsalt": "rain_jax",
}  # fmt: skip

Drawing = Callable[[Any], None]


class Line(NamedTuple):
    """A curve; `low` and `high` bound it where intervals are known."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    series: int | None = None  # its colour, by default that of its place


class Point(NamedTuple):
    """Two accuracies in [0, 1], each with `value`, `low` and `high`, and what is written beside."""

    x: Any
    y: Any
    label: str


def render(draw: Drawing, width: float, height: float) -> tuple[bytes, str]:
    """A drawing as PNG and as SVG, the latter without a background; `width` is in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=140, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def themed(svg: str) -> str:
    """The same SVG in the fonts of the page, with the colours of a dark page where it is one."""
    names = {light: f"--c{place}" for place, light in enumerate(DARK)}
    for light, name in names.items():
        svg = svg.replace(light, f"var({name})")
    light = "".join(f"{name}:{colour};" for colour, name in names.items())
    dark = "".join(f"{name}:{DARK[colour]};" for colour, name in names.items())
    style = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans'")
    return re.sub(r"(<svg[^>]*>)", rf"\1<style>{style}</style>", svg, count=1)


def curves(ax: Any, lines: Sequence[Line]) -> None:
    """Lines in a set of axes, with bands where intervals are known."""
    for place, line in enumerate(lines):
        number = place if line.series is None else line.series
        colour = SERIES[number % len(SERIES)]
        ax.plot(
            line.x, line.y, color=colour, label=line.label,
            marker=MARKERS[number % len(MARKERS)] if len(line.x) <= MANY else None,
        )  # fmt: skip
        if line.low is not None and line.high is not None:
            ax.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)


def legend(figure: Any, axes: Any) -> None:
    """One legend below all axes, for the lines of the first that has each label."""
    found: dict[str, Any] = {}
    for ax in np.ravel(axes):
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        # In letters: what is drawn before a name, and the space behind it, are six or so.
        room, widest = int(figure.get_figwidth() * 14), 6 + max(map(len, found))
        columns = max(1, min(len(found), room // widest))
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def plotted(lines: Sequence[Line], x: str, y: str, marked: float | None = None) -> Drawing:
    """Accuracies in per cent over `x`, from 0 to 100; a thin line where `x` is `marked`."""

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        curves(ax, lines)
        if marked is not None:
            ax.axvline(marked, color=INK, linewidth=0.7, linestyle=":")
        ax.set_ylim(-2, 102)
        if all(float(place).is_integer() for line in lines for place in line.x):
            ax.locator_params(axis="x", integer=True)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        legend(figure, ax)

    return draw


def dots(
    names: Sequence[str], columns: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]]
) -> Drawing:
    """Accuracies with intervals: a line of the figure for each name, a colour for each column."""

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        step = 0.7 / max(len(columns), 1)
        for place, (label, values) in enumerate(columns):
            seen = [(row, value) for row, value in enumerate(values) if value is not None]
            value, low, high = np.array([value for _, value in seen]).reshape(-1, 3).T
            ax.errorbar(
                100 * value,
                [row + (place - (len(columns) - 1) / 2) * step for row, _ in seen],
                xerr=100 * np.maximum([value - low, high - value], 0.0),  # the last bit may be off
                fmt=MARKERS[place % len(MARKERS)], color=SERIES[place % len(SERIES)],
                capsize=2, linewidth=1.2, label=label,
            )  # fmt: skip
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlim(-2, 102)
        ax.set_xlabel("accuracy, %")
        ax.grid(axis="y", visible=False)
        legend(figure, ax)

    return draw


def scattered(series: Sequence[tuple[str, Sequence[Point]]], x: str, y: str) -> Drawing:
    """Accuracies against accuracies, in per cent with what bounds them; a series is joined."""

    def reach(values: Sequence[Any]) -> Any:
        value, low, high = np.array([
            (one.value, one.value if one.low is None else one.low,
             one.value if one.high is None else one.high) for one in values
        ]).T  # fmt: skip
        return 100 * value, 100 * np.maximum([value - low, high - value], 0.0)

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        for place, (label, points) in enumerate(series):
            (across, x_reach), (up, y_reach) = (
                reach([point.x for point in points]), reach([point.y for point in points])
            )  # fmt: skip
            ax.errorbar(
                across, up, xerr=x_reach, yerr=y_reach, color=SERIES[place % len(SERIES)],
                fmt=MARKERS[place % len(MARKERS)] + "-", elinewidth=0.7, label=label,
            )  # fmt: skip
            for point, *where in zip(points, across, up, strict=True):
                ax.annotate(point.label, where, (4, 4), textcoords="offset points", fontsize=7)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        legend(figure, ax)

    return draw


def bars(names: Sequence[str], values: Sequence[float], series: Sequence[int], x: str) -> Drawing:
    """Horizontal bars, written beside."""

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        drawn = ax.barh(
            range(len(names)), values, color=[SERIES[s % len(SERIES)] for s in series], height=0.6
        )
        ax.bar_label(drawn, [f"{value:,.3g}" for value in values], padding=3, fontsize=8)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.12)
        ax.set_xlabel(x)
        ax.grid(axis="y", visible=False)

    return draw


def learning(panels: Sequence[tuple[str, Sequence[Line]]]) -> Drawing:
    """Panels two by two over the steps of training: the label of the axis and its lines."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False)
        for ax, (label, lines) in zip(axes.flat, panels, strict=False):
            curves(ax, lines)
            ax.set_ylabel(label)
            ax.set_xlabel("step")
        for ax in axes.flat[len(panels) :]:
            ax.remove()
        legend(figure, axes)

    return draw


def matrices(
    titles: Sequence[str], shares: Sequence[np.ndarray], rows: Sequence[str],
    columns: Sequence[str], axes: tuple[str, str],
) -> Drawing:  # fmt: skip
    """Tables of per cent side by side, with their numbers where there is room; `axes` (y, x)."""
    readable = max(len(rows), len(columns)) <= 20
    slanted = dict(rotation=60, ha="right", rotation_mode="anchor")

    def draw(figure: Any) -> None:
        each = figure.subplots(1, len(shares), squeeze=False)[0]
        for ax, title, share in zip(each, titles, shares, strict=True):
            ax.imshow(share, vmin=0, vmax=100, interpolation="nearest", aspect="auto")
            ax.grid(visible=False)
            ax.set_title(title)
            ax.set_xlabel(axes[1])
            if not readable:
                continue
            for (row, column), value in np.ndenumerate(share):
                # Literal black and white, since the cell is as bright on a dark page.
                if value > 0:
                    ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
                            color="#ffffff" if value < 55 else "#000000")  # fmt: skip
            turned = slanted if max(map(len, columns)) > 3 else {}
            ax.set_xticks(range(len(columns)), columns, fontsize=7, **turned)
            ax.set_yticks(range(len(rows)), rows, fontsize=7)
        each[0].set_ylabel(axes[0])

    return draw


def heatmaps(titles: Sequence[str], tables: Sequence[np.ndarray]) -> Drawing:
    """Small tables as pictures, each with its own scale."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(tables), squeeze=False)[0]
        for ax, title, table in zip(axes, titles, tables, strict=True):
            figure.colorbar(ax.imshow(table, interpolation="nearest"), ax=ax, shrink=0.8)
            ax.grid(visible=False)
            ax.set(title=title, xticks=[], yticks=[])

    return draw


def gallery(sample: dict[str, np.ndarray], scale: float, names: Sequence[str]) -> Drawing:
    """Images in columns: clean, perturbation, adversarial; what the model takes them for.

    A change of -`scale` is black and one of `scale` white.
    """
    clean, attacked, label = sample["clean"], sample["adversarial"], sample["label"]
    change = attacked - clean
    lines = [
        ("clean", clean, sample["clean_prediction"]),
        ("perturbation", np.clip(0.5 + change / (2 * scale), 0, 1), None),
        ("attacked", attacked, sample["adversarial_prediction"]),
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(lines), len(label), squeeze=False)
        for row, (title, images, prediction) in enumerate(lines):
            for column, image in enumerate(images):
                ax = axes[row, column]
                grey = image.shape[-1] == 1
                ax.imshow(
                    np.clip(image[..., 0] if grey else image, 0, 1), cmap="gray", vmin=0, vmax=1,
                    interpolation="nearest",
                )  # fmt: skip
                ax.set(xticks=[], yticks=[])
                if prediction is not None:
                    right = prediction[column] == label[column]
                    said = names[int(prediction[column])]
                    if not right:
                        is_ = f"{names[int(label[column])]}\n" if row == 0 else ""
                        said = f"{is_}✗ {said}"
                    ax.set_title(said, fontsize=7, pad=2,
                                 color=INK if right else SERIES[1])  # fmt: skip
            axes[row, 0].set_ylabel(title, fontsize=8)

    return draw
