"""The one schema of a benchmark's rows, and where they are kept."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and command, the part that all rows of a run share."""
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": _commit(),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def save(
    name: str,
    device: str,
    rows: list[dict[str, Any]],
    path: Path | None = None,
    *,
    kept: Iterable[dict[str, Any]] = (),
) -> Path:
    """Write the rows of one run as JSON lines, each with the environment, and return the file.

    Rows of an earlier run, as `read` gave them, go in front unchanged if they are `kept`.
    """
    path = path or RESULTS / f"{name}-{device}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = environment(device)
    lines = [*kept, *({"bench": name, **row, **shared} for row in rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `save` wrote; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def reason(error: BaseException) -> str:
    """An error in one short line, with the one that it hides, for a row that has no figure."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    parts = []
    for part in dict.fromkeys((error, first)):
        lines = str(part).strip().splitlines() or [""]
        parts.append(f"{type(part).__name__}: {lines[0][:200]}")
    return "; after ".join(parts)


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Some columns of the rows as aligned text."""
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
