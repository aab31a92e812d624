"""The ground that the other tests stand on holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_unwritten_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(3, dtype=dtype)
    for unwritten in (torch.empty(5, dtype=dtype), like.new_empty(5), torch.empty_like(like)):
        assert unwritten.isnan().all()


def test_unwritten_integers_are_no_valid_positions() -> None:
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_a_process_uses_one_thread() -> None:
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("run", [0, 1])
def test_each_test_starts_from_the_same_seed(run: int) -> None:
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@settings(max_examples=3)
@given(other=st.booleans())
def test_each_example_starts_from_the_same_seed(other: bool) -> None:
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
