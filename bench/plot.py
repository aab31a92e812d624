"""How do milliseconds a token grow with the context? Draws the rows of `bench generate`.

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.rows import RESULTS, read

# Stock ways in greys, ours in a colour; through generate dashed.
STYLES: dict[str, dict[str, Any]] = {
    "stock-dynamic": {"color": "0.6"},
    "stock-static": {"color": "0.25"},
    "stock-offloaded": {"color": "0.6", "linestyle": ":"},
    "stock-generate": {"color": "0.25", "linestyle": "--"},
    "patched": {"color": "tab:orange"},
    "patched-static": {"color": "tab:red"},
    "patched-generate": {"color": "tab:red", "linestyle": "--"},
}


def main(arguments: list[str]) -> None:
    """Draw the plot and save it."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=__doc__)
    parser.add_argument("--input", type=Path, default=RESULTS / "generate-cuda.jsonl")
    parser.add_argument("--output", type=Path, help=".svg or .png; beside the rows by default")
    parser.add_argument("--only", nargs="+", help="these ways")
    options = parser.parse_args(arguments)
    rows = read(options.input)
    found = {
        name: points
        for name, points in curves(rows).items()
        if not options.only or name in options.only
    }
    if not found:
        raise SystemExit(f"no rows to draw in {options.input}: run python -m bench generate first")
    output = options.output or options.input.with_suffix(".svg")
    draw(found, f"{rows[-1].get('model', '')}, {rows[-1].get('device', '')}", output)
    print("saved", output)


def curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Context lengths and milliseconds of each way that was measured, stages left out."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if "ms" in row and not row["what"].startswith(" ") and "," not in row["what"]:
            found.setdefault(row["what"], {})[row["context"]] = row["ms"]
    return {name: sorted(points.items()) for name, points in found.items()}


def draw(found: dict[str, list[tuple[int, float]]], title: str, output: Path) -> None:
    """One line a way, both axes logarithmic, its name at its end."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, points in found.items():
        contexts, milliseconds = zip(*points, strict=True)
        style = STYLES.get(name, {})
        axes.plot(contexts, milliseconds, marker="o", markersize=4, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({context for points in found.values() for context, _ in points})
    axes.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else str(t) for t in ticks])
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms a token")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set_title(title, fontsize="medium")
    figure.savefig(output)
    pyplot.close(figure)
