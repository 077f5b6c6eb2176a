"""The lines of a benchmark, as a table and as bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADERS = ("what", "peer", "peer / ours", "CPU time", "first call", "difference", "ours ms",
           "images/s", "compile s", "GFLOP", "of peak", "MB")  # fmt: skip
_INCHES = 0.28  # of a bar


def cells(line: dict[str, Any]) -> list[list[str]]:
    """The rows of the table that a line makes, one for each peer; one without any."""
    own = [
        _number(line.get("ours_milliseconds")),
        _number(line.get("images_per_second")),
        _number(line.get("compile_seconds")),
        _number(line.get("gflop")),
        _number(line.get("peak_fraction") or line.get("copy_fraction")),
        _number(_mega(line.get("peak_bytes"))),
    ]
    found = []
    for peer, told in line.get("peers", {}).items():
        if "absent" in told:
            found.append([line["what"], peer, told["absent"], "", "", "", *own])
            continue
        differs = f"{max(told['difference']):.1g}" if "difference" in told else "drawn"
        ratios = [*map(_ratio, (told["wall"], told["cpu"])), f"{told['first_call']:.2f}"]
        found.append([line["what"], peer, *ratios, differs, *own])
    return found or [[line["what"], "", _aside(line), "", "", "", *own]]


def _aside(line: dict[str, Any]) -> str:
    """What a line without a peer has to tell."""
    if "empty_cache" in line:
        pair = line["empty_cache"]["seconds"], line["warm_cache"]["seconds"]
        return "{:.1f} s, cached {:.1f} s".format(*pair)
    if "waits_seconds" in line:
        names = "waits", "saved", "restored"
        return ", ".join(f"{name} {line[f'{name}_seconds'][0]:.2g} s" for name in names)
    if "bytes_per_second" in line:
        return f"{line['bytes_per_second'][2] / 1e9:.3g} GB/s"
    return f"{line['gflop'] / line['ours_milliseconds'][1]:.3g} TFLOP/s"


def _ratio(spread: Sequence[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*spread)


def _number(value: Any) -> str:
    """A number, or the median of a spread."""
    value = value[0] if isinstance(value, list) else value
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Ratios with their ranges as bars from 1, to the right where ours is faster."""
    from matplotlib.figure import Figure

    bars = [
        (f"{line['what']}: {peer}", told["wall"])
        for line in reversed(lines)
        for peer, told in reversed(line.get("peers", {}).items())
        if "wall" in told
    ]
    figure = Figure(figsize=(9, 1.2 + _INCHES * max(len(bars), 1)), layout="constrained")
    axes = figure.subplots()
    for place, (_, (middle, least, most)) in enumerate(bars):
        faster = "tab:blue" if middle >= 1 else "tab:orange"
        axes.barh(place, middle - 1, left=1, color=faster, height=0.7)
        axes.plot([least, most], [place, place], color="black", linewidth=1.2)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [what for what, _ in bars], fontsize=8)
    axes.set_xlabel("the peer's time over ours, median and range of the rounds (log scale)")
    figure.savefig(path, dpi=150)
