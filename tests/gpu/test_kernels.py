"""Compiled kernels keep on a GPU what the interpreted ones keep, at the sizes of a GPU.

A kernel takes a second or more to compile, so that what decides how often is drawn from a few.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from kernels.candidates import (
    SecondChoice,
    check_candidate_scores,
    check_injected,
    check_refined_lists,
    second_choices,
)
from kernels.choices import (
    Choice,
    check_agreement,
    check_choice,
    check_chosen,
    check_interruption,
    choices,
    gentle,
    inject,
    lopsided,
    peaked,
)
from kernels.feeds import Feed, check_append, feeds
from kernels.gathers import Gather, check_attention, check_gather, check_pipeline, gathers_like
from kernels.plane_sums import check_planes
from kernels.scores import check_scores
from kernels.steps import Build, Retrieval, make_step, retrievals
from kernels.tensors import LAYOUTS, few
from strategies import DTYPES, Shape, channel_offsets, left_padded_visible, one_nan, ties

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
LONG = 2**20
INDEXES = (RotatedIndex(128), RotatedIndex(64, bits=2), FierIndex(128))
FEEDS = st.sampled_from(
    (
        (RotatedIndex(128), 128, BF16),
        (RotatedIndex(64, bits=2, group_size=32), 5, torch.float32),
        (FierIndex(80, group_size=512), 80, torch.float16),
        (RotatedIndex(128, refine_bits=4), 128, BF16),
        (RotatedIndex(80, refine_bits=2), 80, torch.float32),
    )
)
BUILDS = (
    Build(RotatedIndex(128), dtype=BF16),
    Build(RotatedIndex(128), dtype=BF16, has_mask=True),
    Build(RotatedIndex(64, bits=2), 11, softcap=20.0, has_sink=True),
    Build(FierIndex(128), dtype=torch.float16, per_query_head=True, has_sink=True, has_mask=True),
    Build(FierIndex(64, group_size=256), 11, softcap=20.0),
)
REFINING = (
    Build(RotatedIndex(128, refine_bits=4), dtype=BF16, refine=4),
    Build(RotatedIndex(128, refine_bits=2), 11, softcap=20.0, has_sink=True, refine=2),
    Build(RotatedIndex(80, refine_bits=3), 3, per_query_head=True, has_mask=True, refine=3),
    Build(RotatedIndex(128), dtype=BF16, refine=4),
    Build(FierIndex(64), 11, has_sink=True, has_mask=True, softcap=20.0, refine=4),
)
GATHERS = (
    Gather(Shape(1, 8, 4, 1, 5000, 128, 128), width=1024, dtype=BF16),
    Gather(Shape(2, 2, 8, 1, 3000, 256, 256), width=2048, has_sink=True, softcap=5.0),
    Gather(Shape(2, 1, 3, 2, 900, 80, 5), width=60, dtype=torch.float16, has_counters=False),
    Gather(Shape(1, 2, 4, 2, 900, 64, 48), width=240, per_query_head=True, has_sink=True),
)


@few(10)
@given(feed=feeds(builds=FEEDS, longest=3000, heads=3))
@example(feed=Feed(RotatedIndex(128), 509, 509, (1, 1, 8, 3), 2, 8, 128, dtype=BF16))
@example(
    feed=Feed(RotatedIndex(64, bits=2, group_size=32), 30, 30, (1,) * 36, 2, 4, 5, kind=one_nan)
)
@example(
    feed=Feed(FierIndex(80, group_size=512), 1000, 1000, (1,) * 30, 3, 3, 80, dtype=torch.float16)
)
def test_the_state_is_that_of_the_reference(feed: Feed) -> None:
    check_append(feed, CUDA)


@few(4)
@given(feed=feeds(builds=FEEDS, longest=2000, longest_piece=1500, heads=3))
@example(feed=Feed(RotatedIndex(64, bits=2, group_size=32), 33, 0, (2100, 1), 2, 4, 5))
@example(feed=Feed(RotatedIndex(128), 1, 1, (1200, 2, 800), 2, 4, 128, dtype=BF16))
def test_programs_that_index_one_piece_do_not_disturb_each_other(feed: Feed) -> None:
    check_append(feed, CUDA)


@few(8)
@given(feed=feeds(builds=FEEDS))
def test_tokens_past_the_capacity_are_counted_but_not_written(feed: Feed) -> None:
    check_append(replace(feed, room=-min(sum(feed.pieces), 5)), CUDA)


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_a_kernel_compiled_for_one_launch_is_right_for_others(index: KeyIndex) -> None:
    """Strides that are 1 or a multiple of 16 come first, and sizes that a launch is kept for."""
    feed = Feed(index, 16, 16, (16, 1, 3, 5), 2, 3, value_head_dim=5, kind=channel_offsets)
    for seed, layout in enumerate(LAYOUTS):
        check_append(replace(feed, layout=layout, seed=seed), CUDA)
    for length in (1, 1024, 1025, 7, 1):
        mask = left_padded_visible([0, length // 3], 1, length)
        axes = Shape(2, 2, 4, 1, length, index.head_dim, index.head_dim)
        check_scores(Retrieval(index, axes, visible=mask), CUDA)
    for seed, (length, layout) in enumerate(zip((1536, 1025, 1100, 1500), LAYOUTS, strict=True)):
        mask = left_padded_visible([0, length // 3], 1, length)
        axes = Shape(2, 2, 4, 1, length, index.head_dim, index.head_dim)
        case = Retrieval(index, axes, visible=mask, layout=layout, seed=seed, block=0)
        check_scores(case, CUDA)
        check_agreement(case, CUDA)


@few(12)
@given(case=retrievals(builds=st.sampled_from(BUILDS), longest=6000, block=0))
@example(case=Retrieval(RotatedIndex(256, bits=2), Shape(1, 3, 8, 1, 3000, 256, 256)))
@example(case=Retrieval(FierIndex(256), Shape(1, 3, 8, 1, 3000, 256, 256), softcap=30.0))
def test_scores_are_those_of_the_index(case: Retrieval) -> None:
    check_scores(case, CUDA)


@few(12)
@given(case=retrievals(builds=st.sampled_from(BUILDS), longest=6000, block=0))
def test_the_tokens_are_those_of_the_reference(case: Retrieval) -> None:
    check_agreement(case, CUDA)


@few(20)
@given(choice=choices(builds=st.sampled_from(BUILDS), longest=40_000, most_rows=4, block=0))
@example(Choice(Retrieval(FierIndex(8), Shape(1, 8, 4, 1, 70_000, 8, 8), block=0), ties, 2))
@example(Choice(Retrieval(FierIndex(8), Shape(1, 1, 4, 1, 9000, 8, 8), 4000, block=0), lopsided))
@example(
    Choice(
        Retrieval(
            FierIndex(8),
            Shape(1, 2, 4, 1, 9000, 8, 8),
            budget=6000,
            visible=left_padded_visible([5000], 1, 9000),
            block=0,
        ),
        gentle,
    )
)
def test_the_chosen_are_exactly_the_largest_keys(choice: Choice) -> None:
    check_choice(choice, CUDA)


@pytest.mark.parametrize("build", [BUILDS[0], BUILDS[3]], ids=["rotated", "fier"])
def test_what_an_interrupted_step_left_does_not_change_the_next(build: Build) -> None:
    head_dim = build.index.head_dim
    axes = Shape(2, 2, build.num_groups, 2, 5000, head_dim, head_dim)
    mask = left_padded_visible([0, 700], 2, 5000) if build.has_mask else None
    case = Retrieval(build.index, axes, visible=mask, dtype=build.dtype, block=0)
    sinks = {"per_query_head": build.per_query_head, "has_sink": build.has_sink}
    check_interruption(replace(case, **sinks), CUDA)


@few(12)
@given(case=retrievals(builds=st.sampled_from(REFINING), longest=6000, block=0))
@example(
    case=Retrieval(
        REFINING[0].index, Shape(1, 8, 4, 1, 30_000, 128, 128), 1024, 4, 16, dtype=BF16, block=0,
        refine=4,
    )
)  # fmt: skip
@example(
    case=Retrieval(
        REFINING[3].index, Shape(2, 2, 4, 1, 20_000, 128, 128), 3000, 4, 16, dtype=BF16, block=0,
        refine=4,
    )
)  # fmt: skip
def test_candidates_and_their_scores_are_those_of_the_index(case: Retrieval) -> None:
    check_agreement(case, CUDA)
    check_candidate_scores(case, CUDA)


@few(8)
@given(case=retrievals(builds=st.sampled_from(REFINING), longest=3000, block=0))
def test_with_a_candidate_for_every_token_the_second_scores_alone_decide(case: Retrieval) -> None:
    check_refined_lists(case, CUDA)


@few(15)
@given(choice=second_choices(builds=st.sampled_from(REFINING), longest=30_000))
def test_the_chosen_candidates_are_exactly_those_of_the_largest_keys(choice: SecondChoice) -> None:
    check_injected(choice, CUDA)


@few(15)
@given(case=st.sampled_from(GATHERS).flatmap(gathers_like))
@example(GATHERS[0])
@example(GATHERS[1])
def test_attention_is_as_near_to_float64_as_eager_code(case: Gather) -> None:
    check_gather(case, CUDA)


@pytest.mark.parametrize("build", [BUILDS[1], BUILDS[2]], ids=["masked", "capped"])
def test_with_a_budget_for_every_token_attention_is_dense(build: Build) -> None:
    head_dim = build.index.head_dim
    axes = Shape(2, 2, build.num_groups, 2, 2000, head_dim, head_dim)
    mask = left_padded_visible([0, 700], 2, 2000) if build.has_mask else None
    rest = {"softcap": build.softcap, "has_sink": build.has_sink, "dtype": build.dtype}
    check_pipeline(Retrieval(build.index, axes, visible=mask, block=0, **rest), CUDA)


def test_matrix_units_honour_subnormal_float16_operands() -> None:
    check_planes(CUDA)


@pytest.mark.parametrize("refine", [0, 4])
@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_two_runs_are_equal_to_the_bit(index: KeyIndex, refine: int) -> None:
    from fierpatch.kernels import attention

    axes = Shape(1, 8, 4, 1, 30_000, index.head_dim, index.head_dim)
    dtype = dict(zip(INDEXES, DTYPES, strict=True))[index]
    case = Retrieval(index, axes, 1024, 4, 16, dtype=dtype, block=0, refine=refine)
    step = make_step(case, CUDA)
    query, keys, values = (x.to(CUDA) for x in (step.query, step.keys, step.values))
    runs = []
    for _ in range(4):
        step.score()
        lists = step.select()
        if case.refine:
            step.score_candidates()
            lists = step.select_candidates()
        output = attention.gather_attention(query, keys, values, lists, scale=case.scale)
        runs.append(
            (step.weights()[0], step.scratch.sum[:, : axes.length // 512].clone(), lists, output)
        )
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_million_tokens_of_256_channels_do_not_overflow() -> None:
    """The last of nine heads begins past 2**31 elements."""
    from fierpatch.kernels import attention

    length, heads, head_dim = LONG, 9, 256
    axes = Shape(1, heads, 1, 1, length, head_dim, head_dim)
    case = Retrieval(FierIndex(head_dim), axes, budget=1024, sinks=4, recent=16, block=0)
    step = make_step(case, CUDA, is_indexed=False)
    step.scratch.high.zero_()
    generator = torch.Generator().manual_seed(0)
    kinds = (gentle, ties, peaked)
    drawn = [kinds[head % 3]((1, 1, 1, length, 1), generator) for head in range(heads)]
    logits = inject(step, torch.cat(drawn, dim=1))
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
    from fierpatch.kernels import attention

    axes = Shape(1, 2, 4, 1, 1500, 128, 128)
    case = Retrieval(RotatedIndex(128), axes, budget=100, has_sink=True, block=0)
    step = make_step(case, CUDA)
    step.score()
    sinks = torch.randn(9).to(CUDA)
    lists = [replace(step, sink_logits=x).select() for x in (sinks[1:].clone(), sinks[1:])]
    assert torch.equal(*lists)
    query, keys, values = (x.to(CUDA) for x in (step.query, step.keys, step.values))
    outputs = [
        attention.gather_attention(query, keys, values, lists[0], scale=0.1, sink_logits=x)
        for x in (sinks[1:].clone(), sinks[1:])
    ]
    assert torch.equal(*outputs)
