"""Kernels score as the index does, but for the rounding of the query that they document."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given

import oracles
from fierpatch.index import FierIndex, RotatedIndex
from kernels.choices import check_agreement
from kernels.scores import QUERY_LEVELS, check_scores
from kernels.steps import Retrieval, make_step, retrievals
from kernels.tensors import few
from strategies import Shape, channel_offsets, heavy_tails, left_padded_visible

CPU = torch.device("cpu")


def shape(**sizes: int) -> Shape:
    """One KV head of four query heads, one query, 600 tokens of 64 channels, but for `sizes`."""
    usual = {
        "batch_size": 1,
        "num_kv_heads": 1,
        "num_groups": 4,
        "num_queries": 1,
        "length": 600,
        "head_dim": 64,
        "value_head_dim": 64,
    }
    return Shape(**{**usual, **sizes})


EXAMPLES = (
    Retrieval(RotatedIndex(128), shape(head_dim=128, num_groups=8), softcap=20.0),
    Retrieval(RotatedIndex(64, bits=2), shape(num_groups=3, num_queries=3), kind=channel_offsets),
    Retrieval(RotatedIndex(256, group_size=32), shape(head_dim=256, num_groups=11, length=513)),
    Retrieval(
        RotatedIndex(80, bits=2, group_size=512),
        shape(head_dim=80, batch_size=2, num_queries=2),
        visible=left_padded_visible([100, 512], 2, 600),
    ),
    Retrieval(
        RotatedIndex(64),
        shape(batch_size=2, num_queries=8, length=40),
        visible=left_padded_visible([40, 3], 8, 40),
        budget=20,
    ),
    Retrieval(FierIndex(128), shape(head_dim=128, num_groups=1), kind=heavy_tails),
    Retrieval(FierIndex(64, group_size=256), shape(num_groups=11, num_queries=2), softcap=5.0),
    Retrieval(
        FierIndex(96),
        shape(head_dim=96, num_kv_heads=2, num_groups=5, length=1030),
        visible=left_padded_visible([515], 1, 1030),
        has_sink=True,
        per_query_head=True,
    ),
)


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: f"{case.index}-{case.shape.length}")
def test_scores_of_known_shapes_are_those_of_the_index(case: Retrieval) -> None:
    check_scores(case, CPU)


@few(8)
@given(case=retrievals())
def test_scores_are_those_of_the_index(case: Retrieval) -> None:
    check_scores(case, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_the_rotated_query_is_in_the_nearest_whole_numbers(
    head_dim: int, dtype: torch.dtype
) -> None:
    axes = shape(num_kv_heads=2, num_queries=3, length=200, head_dim=head_dim)
    step = make_step(Retrieval(RotatedIndex(head_dim), axes, dtype=dtype), CPU)
    step.score()
    query = step.query.double().unflatten(1, (axes.num_kv_heads, -1)).transpose(2, 3)
    balanced = query / step.state[3].double()[:, :, None, None]  # [B, H, T, G, D]
    rotated = balanced @ torch.from_numpy(oracles.rotation(head_dim, 0))
    expected = rotated / rotated.norm(dim=-1, keepdim=True) * QUERY_LEVELS
    high, low = step.scratch.operand.view(*expected.shape[:4], 2, head_dim).double().unbind(4)
    # A float32 sum of D terms whose sizes add up to the norm at most; the terms have 22 bits.
    error = QUERY_LEVELS * (head_dim * 2.0**-24 + 2.0**-22)
    assert ((256 * high + low - expected).abs() <= 0.5 + error).all()


def test_weights_are_rounded_and_not_cut_off() -> None:
    """Cut off, a tile's weights would sum to some 0.14 % less than its sum says."""
    axes = shape(num_kv_heads=2, length=2048)
    step = make_step(Retrieval(RotatedIndex(64), axes), CPU)
    step.score()
    weights, _ = step.weights()  # [B, H, T, S, G]
    total = step.scratch.sum.view(1, 2, 1, -1, 4)[:, :, :, :4].double()
    ratio = weights.unflatten(3, (4, 512)).sum(4) / total
    assert (ratio - 1).abs().mean() < 2.0**-12


@few(6)
@given(case=retrievals())
@example(case=EXAMPLES[1])
@example(case=EXAMPLES[4])
@example(case=EXAMPLES[7])
def test_the_tokens_are_those_of_the_reference(case: Retrieval) -> None:
    check_agreement(case, CPU)
