"""How do milliseconds a token grow? Draws rows of `bench generate` or `bench offload`.

Against the context, at one overlap of consecutive selections where there are several, or against
that overlap at one context. Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.rows import RESULTS, read

AXES = {"context": "tokens in the cache", "overlap": "share of a selection that is in the next"}

# Of settings the value that goes without saying, in rows too, and how a curve names another.
USUAL: dict[str, tuple[object, str]] = {
    "layers": (32, "{} layers"),
    "index": ("rotated", "{}"),
    "bits": (1, "{} bits"),
    "budget": (1024, "budget {}"),
    "refine": (0, "refine {}"),
    "hot_tokens": (None, "{} hot rows"),
}
OVERLAP = 0.8  # of those measured at as many contexts the nearest to this
LINES = (":", "-.", "--")  # of other settings

# Stock ways in greys, ours in a colour; through generate dashed.
STYLES: dict[str, dict[str, Any]] = {
    "stock-dynamic": {"color": "0.6"},
    "stock-static": {"color": "0.25"},
    "stock-offloaded": {"color": "0.6", "linestyle": ":"},
    "stock-generate": {"color": "0.25", "linestyle": "--"},
    "patched": {"color": "tab:orange"},
    "patched-static": {"color": "tab:red"},
    "patched-generate": {"color": "tab:red", "linestyle": "--"},
    "resident": {"color": "0.25"},
    "offloaded": {"color": "tab:red"},
    "offloaded, prefetch": {"color": "tab:orange"},
}


def main(arguments: list[str]) -> None:
    """Draw the plot and save it."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=__doc__)
    parser.add_argument("--input", type=Path, default=RESULTS / "generate-cuda.jsonl")
    parser.add_argument("--output", type=Path, help=".svg or .png; beside the rows by default")
    parser.add_argument("--only", nargs="+", help="these ways")
    parser.add_argument("--by", choices=AXES, default="context", help="the horizontal axis")
    options = parser.parse_args(arguments)
    rows = read(options.input)
    found = {
        name: points
        for name, points in curves(rows, options.by).items()
        if not options.only or name in options.only
    }
    if not found:
        raise SystemExit(f"no rows to draw in {options.input}: run python -m bench generate first")
    ending = ".svg" if options.by == "context" else f"-{options.by}.svg"
    output = options.output or options.input.with_name(options.input.stem + ending)
    parts = [rows[-1].get("model"), rows[-1].get("device"), shared(rows, options.by)]
    draw(found, ", ".join(part for part in parts if part), output, options.by)
    print("saved", output)


def curves(rows: list[dict[str, Any]], by: str = "context") -> dict[str, list[tuple[float, float]]]:
    """Where and milliseconds of each way that was measured there, stages left out.

    Rows of other settings are another curve, and all are of one overlap, or context: see `fixed`.
    """
    other, value = fixed(rows, by)
    found: dict[str, dict[float, float]] = {}
    for row in _measured(rows):
        if row.get(by) is not None and (value is None or row.get(other) == value):
            found.setdefault(_name(row), {})[row[by]] = row["ms"]
    return {name: sorted(points.items()) for name, points in found.items()}


def fixed(rows: list[dict[str, Any]], by: str) -> tuple[str, float | None]:
    """The other axis, and where on it the picture is: where most of this one was measured.

    Of equals at the overlap nearest to 0.8, or the longest context; None where no row tells.
    """
    other = next(name for name in AXES if name != by)
    places = defaultdict(set)
    for row in _measured(rows):
        if row.get(by) is not None and row.get(other) is not None:
            places[row[other]].add(row[by])

    def rank(value: float) -> tuple[int, float]:
        return len(places[value]), value if other == "context" else -abs(value - OVERLAP)

    return other, max(places, key=rank, default=None)


def shared(rows: list[dict[str, Any]], by: str) -> str:
    """What all points have in common, for the title."""
    other, value = fixed(rows, by)
    if value is None:
        return ""
    return f"overlap {value:g}" if other == "overlap" else f"{_tokens(int(value))} tokens"


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["what"] in STYLES and "ms" in row]


def _name(row: dict[str, Any]) -> str:
    """A way, and each setting of its that is not the usual one."""
    parts = [row["what"]]
    for setting, (usual, form) in USUAL.items():
        value = row.get(setting)
        is_own = setting == "layers" or not row["what"].startswith("stock")
        if setting == "hot_tokens":
            is_own = row["what"].startswith("offloaded")
        if is_own and value is not None and value != usual:
            parts.append(form.format(value))
    return ", ".join(parts)


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def draw(
    found: dict[str, list[tuple[float, float]]], title: str, output: Path, by: str = "context"
) -> None:
    """One line a way, or a point; milliseconds on a logarithmic axis where they differ much."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    num_others: dict[str, int] = defaultdict(int)  # curves of a way, of other settings
    for name, points in found.items():
        where, milliseconds = zip(*points, strict=True)
        way = max((way for way in STYLES if f"{name}, ".startswith(f"{way}, ")), key=len)
        style = {"marker": "o", "markersize": 4, **STYLES[way]}
        if name != way:
            line = LINES[num_others[way] % len(LINES)]
            style |= {"linestyle": line, "markerfacecolor": "white"}
            num_others[way] += 1
        if len(points) == 1:
            style |= {"linestyle": "none", "markersize": 6}
        axes.plot(where, milliseconds, label=name, **style)
    axes.set_xlabel(AXES[by])
    axes.set_ylabel("ms a token")
    if by == "context":
        axes.set_xscale("log", base=2)
        ticks = sorted({int(x) for points in found.values() for x, _ in points})
        axes.set_xticks(ticks, [*map(_tokens, ticks)])
    heights = [y for points in found.values() for _, y in points]
    if max(heights) > 4 * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set_title(title, fontsize="medium")
    figure.savefig(output)
    pyplot.close(figure)
