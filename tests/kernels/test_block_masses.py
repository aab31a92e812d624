"""The kernel that weighs blocks of keys gives what the reference does."""

from __future__ import annotations

import pytest
import torch

from kernels.block_masses import check_block_masses


@pytest.mark.parametrize(
    "case",
    [
        {"num_queries": 300, "stored": 0},
        {"num_queries": 130, "stored": 1200, "heads": (2, 3)},  # more blocks than a program has
        {"num_queries": 9, "stored": 70, "head_dim": 80, "softcap": 3.0},
        {"num_queries": 200, "stored": 60, "pads": (0, 255), "heads": (1, 2)},
        {"num_queries": 140, "stored": 30, "pads": (0, 10), "has_rows": True},
        {"num_queries": 100, "stored": 0, "head_dim": 256, "dtype": torch.float16},
        {"num_queries": 100, "stored": 28, "layout": "offset", "dtype": torch.float16},
        {"num_queries": 100, "stored": 28, "layout": "transposed"},
    ],
    ids=str,
)
def test_masses_of_blocks_are_those_of_the_reference(case: dict[str, object]) -> None:
    check_block_masses(**case)  # type: ignore[arg-type]
