"""How do milliseconds a token grow? Draws rows of `bench generate` or `bench offload`.

Against the context, or how far consecutive selections overlap. Needs matplotlib, which nothing else
here does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.rows import RESULTS, read

AXES = {"context": "tokens in the cache", "overlap": "share of a selection that is in the next"}

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
    output = options.output or options.input.with_suffix(".svg")
    title = f"{rows[-1].get('model', '')}, {rows[-1].get('device', '')}"
    draw(found, title, output, options.by)
    print("saved", output)


def curves(rows: list[dict[str, Any]], by: str = "context") -> dict[str, list[tuple[float, float]]]:
    """Where and milliseconds of each way that was measured there, stages left out.

    Against the overlap it is the longest context that was measured at several.
    """
    found: dict[str, dict[float, float]] = {}
    if by == "overlap":
        rows = [row for row in rows if row.get("overlap") is not None and "ms" in row]
        contexts = [row["context"] for row in rows]
        longest = max((x for x in contexts if contexts.count(x) > 1), default=None)
        rows = [row for row in rows if row["context"] == longest]
    for row in rows:
        is_stage = row["what"].startswith(" ") or row["what"] not in STYLES
        if "ms" in row and row.get(by) is not None and not is_stage:
            name = row["what"]
            if row.get("hot_tokens"):
                name += f", {row['hot_tokens']} hot rows"
            found.setdefault(name, {})[row[by]] = row["ms"]
    return {name: sorted(points.items()) for name, points in found.items()}


def draw(
    found: dict[str, list[tuple[float, float]]], title: str, output: Path, by: str = "context"
) -> None:
    """One line a way; against the context both axes are logarithmic."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, points in found.items():
        where, milliseconds = zip(*points, strict=True)
        way, _, hot = name.partition(", ")
        style = STYLES.get(name, STYLES.get(way, {}))
        if hot.endswith("rows"):
            style = {**style, "linestyle": ":"}
        axes.plot(where, milliseconds, marker="o", markersize=4, label=name, **style)
    axes.set_xlabel(AXES[by])
    axes.set_ylabel("ms a token")
    if by == "context":
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({int(x) for points in found.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else str(t) for t in ticks])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set_title(title, fontsize="medium")
    figure.savefig(output)
    pyplot.close(figure)
