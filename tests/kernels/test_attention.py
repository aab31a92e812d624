"""Attention over lists of tokens is that of the reference, split or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given

from fierpatch.index import FierIndex, RotatedIndex
from kernels.gathers import Gather, check_gather, check_pipeline, gathers
from kernels.steps import Retrieval, retrievals
from kernels.tensors import few
from strategies import Shape, left_padded_visible

CPU = torch.device("cpu")


@few(25)
@given(case=gathers())
@example(Gather(Shape(1, 1, 4, 1, 900, 64, 64), width=700, has_sink=True, softcap=5.0))
@example(Gather(Shape(2, 2, 2, 2, 300, 80, 5), width=130, per_query_head=True, has_sink=True))
@example(Gather(Shape(1, 2, 17, 1, 300, 256, 48), width=65, dtype=torch.float16))
@example(Gather(Shape(1, 1, 1, 1, 1, 64, 64), width=1, fill=1.0))
@example(Gather(Shape(2, 1, 8, 3, 200, 96, 96), width=257, fill=0.02, layout="transposed"))
@example(Gather(Shape(1, 1, 4, 1, 324, 256, 48), width=63, fill=0.1, has_sink=True, seed=1273))
@example(Gather(Shape(1, 2, 2, 1, 300, 64, 64), width=130, softcap=50.0))
def test_attention_is_as_near_to_float64_as_eager_code(case: Gather) -> None:
    check_gather(case, CPU)


@pytest.mark.parametrize("width", [5, 300])
def test_more_tokens_than_the_buffer_holds_give_nan(width: int) -> None:
    from fierpatch.kernels import append, attention

    query, keys = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 20, 64)
    lists = torch.arange(width).expand(2, 2, 1, width).clone()
    lists[lists >= 20] = -1
    counters = append.new_counters(CPU)
    for stored, is_nan in ((20, False), (21, True)):
        counters[0] = stored
        found = attention.gather_attention(
            query, keys, keys, lists, scale=1.0, softcap=0.0, counters=counters
        )
        assert found.isnan().all() if is_nan else found.isfinite().all()


def test_splits_may_share_scratch_that_held_other_numbers() -> None:
    from fierpatch.kernels import attention

    query, keys = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 256, 64)
    lists = torch.stack([torch.randperm(256) for _ in range(2)]).view(1, 2, 1, 256)
    arrivals = torch.zeros(8, dtype=torch.int32)
    partial = torch.full((100_000,), torch.nan)
    fresh = attention.gather_attention(query, keys, keys, lists, scale=0.1)
    for _ in range(2):
        again = attention.gather_attention(
            query, keys, keys, lists, scale=0.1, arrivals=arrivals, allocate=lambda size: partial
        )
        assert torch.equal(fresh, again)
        assert (arrivals == 0).all()


@few(3)
@given(case=retrievals(longest=300, most_rows=2))
@example(
    Retrieval(
        RotatedIndex(64, bits=2),
        Shape(2, 1, 3, 2, 140, 64, 48),
        visible=left_padded_visible([0, 100], 2, 140),
        has_sink=True,
    )
)
@example(Retrieval(FierIndex(80), Shape(1, 2, 4, 1, 520, 80, 80), softcap=20.0, room=1))
def test_with_a_budget_for_every_token_attention_is_dense(case: Retrieval) -> None:
    check_pipeline(case, CPU)
