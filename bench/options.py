"""Options that the benches share: which index a patched model has, and how much is tried."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from bench.prompts import INDEXES
from fierpatch import FierConfig
from fierpatch.index import KeyIndex

_NAMES = ("index", "bits", "refine", "refine_bits")
_TRIED = ("dense_layers", "sinks", "recent")
TRIAL = ["index", *_TRIED, "budget"]  # columns that say what was tried
BYTES = ["scanned_bytes", "refined_bytes", "bytes_per_token"]  # columns of `index_bytes`


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
    """Options for fewer of `INDEXES`, other settings beside them, and another file of rows."""
    names = list(INDEXES)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these indexes")
    for name in _TRIED:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, nargs="+", default=[getattr(FierConfig, name)])
    parser.add_argument("--output", type=Path, help="the file of rows")


def trials(options: argparse.Namespace) -> list[tuple[str, FierConfig]]:
    """Every combination of what `add_trial` and a bench's ``--budget`` take, and its index's name.

    Raises:
        ConfigError: a combination's sinks and recents do not fit into its budget.
    """
    columns = TRIAL[1:]
    chosen = (getattr(options, column) for column in columns)
    return [
        (name, FierConfig(**dict(zip(columns, values, strict=True)), **INDEXES[name]))
        for name, *values in product(options.only, *chosen)
    ]


def trial_columns(name: str, settings: FierConfig | None) -> dict[str, Any]:
    """The columns `TRIAL` of a row; the dense model has no settings."""
    return {"index": name} | {column: getattr(settings, column, None) for column in TRIAL[1:]}


def index_bytes(index: KeyIndex, *, by_keys: bool = False) -> dict[str, float]:
    """The columns `BYTES` of a row: bytes of a KV head that are scanned, refined and held.

    Scanned and held are of every token, refined of every candidate. `by_keys` says that candidates
    are scored again by their keys, of 16 bits a channel, which no index holds.
    """
    return {
        "scanned_bytes": index.scanned_bytes_per_token,
        "refined_bytes": 2.0 * index.head_dim if by_keys else index.refined_bytes_per_token,
        "bytes_per_token": index.bytes_per_token,
    }


def _bits(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


_bits.__name__ = "number or exact"  # what argparse calls it
