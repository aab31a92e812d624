"""Compiled kernels keep on a GPU what the interpreted ones keep, at the sizes of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given

from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from kernels.choices import (
    Choice,
    check_agreement,
    check_choice,
    check_chosen,
    choices,
    gentle,
    inject,
    peaked,
)
from kernels.feeds import Feed, check_append, feeds
from kernels.gathers import Gather, check_attention, check_gather, check_pipeline, gathers
from kernels.plane_sums import check_planes
from kernels.scores import check_scores
from kernels.steps import Retrieval, make_step, retrievals
from kernels.tensors import few
from strategies import DTYPES, Shape, channel_offsets, left_padded_visible, one_nan, ties

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LONG = 2**20
INDEXES = (RotatedIndex(128), RotatedIndex(64, bits=2), FierIndex(128))


@few(60)
@given(feed=feeds(longest=5000, dtypes=DTYPES, heads=4))
@example(feed=Feed(RotatedIndex(128), 509, 509, (1, 1, 8, 3), 2, 8, kind=channel_offsets))
@example(feed=Feed(RotatedIndex(256, bits=2), 126, 60, (1, 1, 1), dtype=torch.bfloat16))
@example(feed=Feed(FierIndex(80, group_size=512), 1000, 1000, (1,) * 40, 3, 3, kind=one_nan))
def test_the_state_is_that_of_the_reference(feed: Feed) -> None:
    check_append(feed, CUDA)


@few(40)
@given(feed=feeds(longest=2000, longest_piece=1500, dtypes=DTYPES, heads=3))
@example(feed=Feed(RotatedIndex(64, bits=2, group_size=32), 33, 0, (2100, 1), 2, 4))
@example(feed=Feed(RotatedIndex(128, group_size=512), 1, 1, (1200, 2, 800), 2, 4))
def test_programs_that_index_one_piece_do_not_disturb_each_other(feed: Feed) -> None:
    check_append(feed, CUDA)


@few(20)
@given(feed=feeds(dtypes=DTYPES))
def test_tokens_past_the_capacity_are_counted_but_not_written(feed: Feed) -> None:
    check_append(replace(feed, room=-min(sum(feed.pieces), 5)), CUDA)


def test_a_kernel_compiled_for_one_stride_is_right_for_another() -> None:
    """Strides that are 1 or a multiple of 16 come first."""
    check_append(Feed(RotatedIndex(64), 16, 16, (16, 1, 3, 5), 2, 3, value_head_dim=5), CUDA)
    check_append(Feed(FierIndex(64), 16, 16, (16, 1, 3, 5), 2, 3, value_head_dim=5), CUDA)
    for index in INDEXES:
        for length in (1, 1024, 1025, 7, 1):
            mask = left_padded_visible([0, length // 3], 1, length)
            axes = Shape(2, 2, 4, 1, length, index.head_dim, index.head_dim)
            check_scores(Retrieval(index, axes, visible=mask), CUDA)


@few(40)
@given(case=retrievals(longest=20_000, dtypes=DTYPES, most_rows=16, block=4096))
@example(case=Retrieval(RotatedIndex(256, bits=2), Shape(2, 8, 8, 1, 9000, 256, 256)))
@example(case=Retrieval(FierIndex(256), Shape(2, 8, 8, 1, 9000, 256, 256), softcap=30.0))
def test_scores_are_those_of_the_index(case: Retrieval) -> None:
    check_scores(case, CUDA)


@few(40)
@given(case=retrievals(longest=20_000, dtypes=DTYPES, most_rows=16, block=4096))
def test_the_tokens_are_those_of_the_reference(case: Retrieval) -> None:
    check_agreement(case, CUDA)


@few(60)
@given(choice=choices(longest=70_000, most_rows=8, block=4096))
@example(Choice(Retrieval(FierIndex(8), Shape(1, 8, 4, 1, 70_000, 8, 8), budget=1024), ties, 2))
def test_the_chosen_are_exactly_the_largest_keys(choice: Choice) -> None:
    check_choice(choice, CUDA)


@few(60)
@given(case=gathers(longest=5000, widths=(1, 5, 64, 65, 130, 257, 512, 1024, 2500), dtypes=DTYPES))
@example(Gather(Shape(1, 8, 4, 1, 5000, 128, 128), width=1024, dtype=torch.bfloat16))
@example(Gather(Shape(2, 2, 8, 1, 3000, 256, 256), width=2048, has_sink=True, softcap=5.0))
def test_attention_is_as_near_to_float64_as_eager_code(case: Gather) -> None:
    check_gather(case, CUDA)


@few(20)
@given(case=retrievals(longest=3000, dtypes=DTYPES, most_rows=8))
def test_with_a_budget_for_every_token_attention_is_dense(case: Retrieval) -> None:
    check_pipeline(case, CUDA)


def test_matrix_units_honour_subnormal_float16_operands() -> None:
    check_planes(CUDA)


@pytest.mark.parametrize("index", INDEXES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_to_the_bit(index: KeyIndex, dtype: torch.dtype) -> None:
    from fierpatch.kernels import attention

    axes = Shape(2, 8, 4, 1, 30_000, index.head_dim, index.head_dim)
    case = Retrieval(index, axes, budget=1024, sinks=4, recent=16, dtype=dtype, block=4096)
    step = make_step(case, CUDA)
    query, keys, values = (x.to(CUDA) for x in (step.query, step.keys, step.values))
    runs = []
    for _ in range(4):
        step.score()
        lists = step.select()
        output = attention.gather_attention(query, keys, values, lists, scale=case.scale)
        runs.append(
            (step.logits(), step.scratch.sum[:, : axes.length // 512].clone(), lists, output)
        )
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [gentle, ties, peaked], ids=lambda kind: kind.__name__)
def test_a_million_tokens_of_256_channels_do_not_overflow(
    kind: Callable[..., torch.Tensor],
) -> None:
    """The last of nine heads begins past 2**31 elements."""
    from fierpatch.kernels import attention

    length, heads, head_dim = LONG, 9, 256
    axes = Shape(1, heads, 2, 1, length, head_dim, head_dim)
    case = Retrieval(FierIndex(head_dim), axes, budget=1024, sinks=4, recent=16, block=4096)
    step = make_step(case, CUDA, is_indexed=False)
    generator = torch.Generator().manual_seed(0)
    logits = inject(step, kind((1, heads, 1, length, 2), generator))
    lists = step.select()
    check_chosen(step, lists.cpu(), logits)

    keys = torch.empty(1, heads, length, head_dim, dtype=torch.bfloat16, device=CUDA).normal_()
    query = step.query.bfloat16()
    found = attention.gather_attention(
        query.to(CUDA), keys, keys, lists, scale=case.scale, counters=step.counters
    )
    rows = lists[0, :, 0, :, None].expand(-1, -1, head_dim)
    chosen = keys[0].gather(1, rows)[None].cpu()  # [1, H, K, D]
    attended = np.ones((*query.shape[:3], chosen.shape[2]), dtype=bool)
    check_attention(
        found.cpu().transpose(1, 2), query, chosen, chosen, attended, case.scale, 0.0, None
    )


def test_sink_logits_may_lie_at_any_address() -> None:
    """A layer's sinks may be a row of a larger tensor."""
    axes = Shape(1, 2, 4, 1, 1500, 128, 128)
    case = Retrieval(RotatedIndex(128), axes, budget=100, has_sink=True, block=4096)
    step = make_step(case, CUDA)
    step.score()
    sinks = torch.randn(9).to(CUDA)
    lists = [replace(step, sink_logits=x).select() for x in (sinks[1:].clone(), sinks[1:])]
    assert torch.equal(*lists)
