"""Options that the benches share: which index a patched model has, and how much is tried."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.prompts import INDEXES

_NAMES = ("index", "bits", "refine", "refine_bits")


def add_index(parser: argparse.ArgumentParser) -> None:
    """Options for the index; see `FierConfig` for what they mean."""
    parser.add_argument("--index", default="rotated")
    parser.add_argument("--bits", type=int, default=1)
    parser.add_argument("--refine", type=int, default=0, help="candidates, in budgets")
    parser.add_argument("--refine-bits", type=_bits, default=4, help="2, 3, 4 or exact")


def index_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was chosen, as settings of the patch and columns of a row."""
    return {name: getattr(options, name) for name in _NAMES}


def add_trial(parser: argparse.ArgumentParser) -> None:
    """Options for fewer of `INDEXES`, other layers dense, and another file of rows."""
    names = list(INDEXES)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these indexes")
    parser.add_argument("--dense-layers", type=int, nargs="+", default=[2])
    parser.add_argument("--output", type=Path, help="the file of rows")


def _bits(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


_bits.__name__ = "number or exact"  # what argparse calls it
