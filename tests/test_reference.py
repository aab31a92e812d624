"""The specification does what attention does, over the tokens it is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch import reference
from fierpatch.index import RotatedIndex
from fierpatch.select import causal_visible, select
from states import build
from strategies import (
    DTYPES,
    Problem,
    Shape,
    channel_offsets,
    gaussian,
    indexes,
    masks,
    problems,
    seeds,
    shapes,
)

DIMS = (3, 8, 24, 64, 80)


@st.composite
def options(draw: st.DrawFn, num_query_heads: int, head_dim: int) -> dict[str, Any]:
    """Scale, and sometimes a softcap or sink logits."""
    chosen: dict[str, Any] = {"scale": draw(st.sampled_from((head_dim**-0.5, 0.3)))}
    extra = draw(st.sampled_from(("none", "softcap", "sinks", "both")))
    if extra in ("softcap", "both"):
        chosen["softcap"] = draw(st.sampled_from((1.0, 30.0)))
    if extra in ("sinks", "both"):
        generator = torch.Generator().manual_seed(draw(seeds()))
        chosen["sink_logits"] = torch.randn(num_query_heads, generator=generator)
    return chosen


def for_oracle(options: dict[str, Any]) -> dict[str, Any]:
    """The same options, their tensors as arrays."""
    return {
        name: oracles.exact(value) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }


def expected_attention(
    query: Tensor, keys: Tensor, values: Tensor, attended: oracles.BoolArray, chosen: dict[str, Any]
) -> tuple[oracles.Array, float]:
    """Attention in float64, and the largest sum of the sizes of its terms.

    An error in a logit changes the output by at most as much as it changes the terms, and a logit
    errs by the sizes of its own terms.
    """
    exact_query, exact_keys, exact_values = map(oracles.exact, (query, keys, values))
    expected, sizes = (
        oracles.attention(exact_query, exact_keys, x, attended, **for_oracle(chosen))
        for x in (exact_values, np.abs(exact_values))
    )
    grouped = np.abs(exact_query).reshape(*keys.shape[:2], -1, keys.shape[3])  # [B, H, G * T, D]
    products = grouped @ np.nan_to_num(np.abs(exact_keys)).swapaxes(2, 3)
    return expected, float(sizes.max() * (1 + chosen["scale"] * products.max()))


def visible_of(problem: Problem) -> Tensor:
    """The mask in full, ``[B, 1, T, S]``; causal where the problem has none."""
    num_queries, length = problem.query.shape[2], problem.keys.shape[2]
    if problem.visible is not None:
        return problem.visible
    visible = causal_visible(num_queries, length, problem.keys.device)
    return visible.expand(problem.query.shape[0], 1, -1, -1)


def draw_lists(
    problem: Problem, per_query_head: bool, size: int, generator: torch.Generator
) -> Tensor:
    """Token lists ``[B, H or Hq, T, K]`` at random among the visible, with unused slots."""
    heads = problem.query.shape[1] if per_query_head else problem.keys.shape[1]
    shape = (problem.query.shape[0], heads, problem.query.shape[2], problem.keys.shape[2])
    priority = torch.rand(shape, generator=generator)
    return select(
        priority,
        num_kv_heads=heads,
        budget=size,
        per_query_head=True,
        visible=visible_of(problem),
    )


@given(
    data=st.data(),
    problem=problems(longest=300, head_dims=DIMS, kinds=(gaussian,)),
    per_query_head=st.booleans(),
    size=st.integers(1, 310),
    seed=seeds(),
)
def test_gathered_attention_is_attention_over_the_listed_tokens(
    data: st.DataObject, problem: Problem, per_query_head: bool, size: int, seed: int
) -> None:
    """In any dtype, with no more error than eager code of that dtype has."""
    query, keys, values = problem.query, problem.keys, problem.values
    lists = draw_lists(problem, per_query_head, size, torch.Generator().manual_seed(seed))
    chosen = data.draw(options(query.shape[1], query.shape[3]))
    output = reference.gather_attention(query, keys, values, lists, **chosen)
    attended = oracles.attended_by(lists, query.shape[1], keys.shape[2])
    expected, terms = expected_attention(query, keys, values, attended, chosen)
    eager = oracles.eager_attention(query, keys, values, torch.from_numpy(attended), **chosen)
    assert output.dtype == query.dtype
    assert output.shape == (*query.shape[:3], values.shape[3])
    error = np.abs(oracles.exact(output) - expected).max()
    assert error <= oracles.rounding_allowed(eager.nan_to_num(), expected, terms)


@given(data=st.data(), problem=problems(longest=300, head_dims=DIMS, kinds=(gaussian,)))
def test_masked_attention_is_attention_over_the_visible_tokens(
    data: st.DataObject, problem: Problem
) -> None:
    query, keys, values = problem.query, problem.keys, problem.values
    visible = visible_of(problem)
    chosen = data.draw(options(query.shape[1], query.shape[3]))
    output = reference.masked_attention(query, keys, values, visible, **chosen)
    attended = visible.expand(*query.shape[:3], -1).numpy()
    expected, terms = expected_attention(query, keys, values, attended, chosen)
    eager = oracles.eager_attention(query, keys, values, visible, **chosen)
    assert output.dtype == query.dtype
    error = np.abs(oracles.exact(output) - expected).max()
    assert error <= oracles.rounding_allowed(eager.nan_to_num(), expected, terms)


@given(
    data=st.data(),
    problem=problems(longest=300, head_dims=DIMS, dtypes=(torch.float64,), kinds=(gaussian,)),
    per_query_head=st.booleans(),
    size=st.integers(1, 310),
    seed=seeds(),
)
def test_gathering_equals_masking_in_float64(
    data: st.DataObject, problem: Problem, per_query_head: bool, size: int, seed: int
) -> None:
    query, keys, values = problem.query, problem.keys, problem.values
    lists = draw_lists(problem, per_query_head, size, torch.Generator().manual_seed(seed))
    chosen = data.draw(options(query.shape[1], query.shape[3]))
    gathered = reference.gather_attention(query, keys, values, lists, **chosen)
    mask = torch.from_numpy(oracles.attended_by(lists, query.shape[1], keys.shape[2]))
    masked = reference.masked_attention(query, keys, values, mask, **chosen)
    assert gathered.dtype == masked.dtype == torch.float64
    assert (gathered - masked).abs().max() <= 1e-12


@given(
    shape=shapes(longest=300, head_dims=DIMS),
    is_listed=st.booleans(),
    beyond=st.integers(0, 50),
    seed=seeds(),
)
def test_a_budget_beyond_the_length_is_dense_attention(
    shape: Shape, is_listed: bool, beyond: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (
        gaussian(axes, generator).double() for axes in (shape.query, shape.keys, shape.values)
    )
    visible = causal_visible(shape.num_queries, shape.length, keys.device)
    scale = shape.head_dim**-0.5
    if is_listed:
        index = RotatedIndex(shape.head_dim)
        lists = reference.select_from_index(
            index,
            build(index, keys),
            query,
            shape.length,
            budget=shape.length + beyond,
            sinks=0,
            recent=1,
            per_query_head=False,
            scale=scale,
        )
        output = reference.gather_attention(query, keys, values, lists, scale=scale)
    else:
        output = reference.masked_attention(query, keys, values, visible, scale=scale)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, scale=scale, enable_gqa=True
    )
    assert (output - dense).abs().max() <= 1e-12


@given(problem=problems(longest=300, head_dims=DIMS), per_query_head=st.booleans(), seed=seeds())
def test_what_padding_holds_never_reaches_the_output(
    problem: Problem, per_query_head: bool, seed: int
) -> None:
    """NaN in padded keys and values gives the same bits as zeros there."""
    query, keys, values = problem.query, problem.keys, problem.values
    lists = draw_lists(problem, per_query_head, 40, torch.Generator().manual_seed(seed))
    clean = keys.nan_to_num(), values.nan_to_num()
    for attend, chosen in (
        (reference.gather_attention, lists),
        (reference.masked_attention, visible_of(problem)),
    ):
        output = attend(query, keys, values, chosen, scale=0.3)
        assert output.isfinite().all()
        assert torch.equal(output, attend(query, *clean, chosen, scale=0.3))


@given(problem=problems(longest=100, head_dims=DIMS, kinds=(gaussian,)), seed=seeds())
def test_the_order_of_a_list_and_its_unused_slots_do_not_matter(
    problem: Problem, seed: int
) -> None:
    """Unused slots may lie anywhere; the sum is taken in another order, so not to the last bit."""
    query, keys, values = problem.query.double(), problem.keys.double(), problem.values.double()
    generator = torch.Generator().manual_seed(seed)
    lists = draw_lists(problem, False, 30, generator)
    shuffled = torch.nn.functional.pad(lists, (0, 5), value=-1)
    shuffled = shuffled[..., torch.randperm(shuffled.shape[3], generator=generator)]
    one, other = (
        reference.gather_attention(query, keys, values, chosen, scale=0.3)
        for chosen in (lists, shuffled)
    )
    assert (one - other).abs().max() <= 1e-12


@pytest.mark.parametrize("sink_logits", [None, torch.zeros(4)])
def test_a_query_without_tokens_gives_zero(sink_logits: Tensor | None) -> None:
    query, keys = torch.randn(1, 4, 2, 8), torch.full((1, 2, 5, 8), torch.nan)
    lists = torch.full((1, 2, 2, 3), -1)
    dark = torch.zeros(1, 1, 2, 5, dtype=torch.bool)
    zero = torch.zeros(1, 4, 2, 8)
    chosen: dict[str, Any] = {"scale": 1.0, "sink_logits": sink_logits}
    assert torch.equal(reference.gather_attention(query, keys, keys, lists, **chosen), zero)
    assert torch.equal(reference.masked_attention(query, keys, keys, dark, **chosen), zero)


@given(shape=shapes(longest=100, head_dims=DIMS), dtype=st.sampled_from(DTYPES), seed=seeds())
def test_exact_scores_are_products_of_queries_and_keys(
    shape: Shape, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, keys = (gaussian(axes, generator).to(dtype) for axes in (shape.query, shape.keys))
    scores = reference.exact_scores(query, keys)
    assert scores.dtype == torch.float32
    expected = np.zeros(scores.shape)
    for h in range(query.shape[1]):
        expected[:, h] = oracles.exact(query)[:, h] @ oracles.exact(keys)[
            :, h // shape.num_groups
        ].transpose(0, 2, 1)
    eager = query.float() @ keys.float().repeat_interleave(shape.num_groups, 1).transpose(2, 3)
    error = np.abs(oracles.exact(scores) - expected).max()
    assert error <= oracles.rounding_allowed(eager, expected)
    in_float64 = reference.exact_scores(query.double(), keys)
    assert np.abs(oracles.exact(in_float64) - expected).max() <= 1e-12


@given(shape=shapes(longest=600, head_dims=DIMS), data=st.data(), seed=seeds())
def test_every_query_head_scores_against_its_own_kv_head(
    shape: Shape, data: st.DataObject, seed: int
) -> None:
    index = data.draw(indexes(head_dims=(shape.head_dim,)))
    generator = torch.Generator().manual_seed(seed)
    query, keys = gaussian(shape.query, generator), gaussian(shape.keys, generator)
    state = build(index, keys)
    scores = reference.index_scores(index, state, query, shape.length)
    assert scores.shape == (*shape.query[:3], shape.length)
    keys_held = index.dequantize(state, shape.length).repeat_interleave(shape.num_groups, 1)
    exact = query.double() @ keys_held.double().transpose(2, 3)
    size = query.abs().sum(-1, keepdim=True) * keys_held.abs().amax((2, 3), keepdim=True)
    # Another head's score would be off by the size of a score; rounding is far below that.
    assert ((scores - exact).abs() <= 1e-4 * size).all()


@given(
    problem=problems(longest=300, head_dims=DIMS, dtypes=(torch.float32,)),
    data=st.data(),
    budget=st.integers(4, 310),
    per_query_head=st.booleans(),
)
def test_selecting_from_the_index_is_scoring_then_selecting(
    problem: Problem, data: st.DataObject, budget: int, per_query_head: bool
) -> None:
    """And without a mask every query sees up to its own token."""
    query, keys = problem.query, problem.keys
    length = keys.shape[2]
    index = data.draw(indexes(head_dims=(query.shape[3],)))
    state = build(index, keys)
    chosen: dict[str, Any] = {
        "budget": budget,
        "sinks": 1,
        "recent": 3,
        "per_query_head": per_query_head,
        **data.draw(options(query.shape[1], query.shape[3])),
    }
    lists = reference.select_from_index(
        index, state, query, length, visible=problem.visible, **chosen
    )
    scores = reference.index_scores(index, state, query, length)
    expected = select(scores, num_kv_heads=keys.shape[1], visible=visible_of(problem), **chosen)
    assert torch.equal(lists, expected)


def two_stages(
    index: Any,
    state: list[Tensor],
    problem: Problem,
    by_keys: bool,
    refine: int,
    budget: int,
    per_query_head: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Scores of every token by the second stage, and which of them the first one lets through."""
    query, keys = problem.query, problem.keys
    num_kv_heads, length = keys.shape[1:3]
    rest: dict[str, Any] = {"num_kv_heads": num_kv_heads, "per_query_head": per_query_head}
    rest |= {"sinks": 1, "recent": 3, "visible": visible_of(problem)}
    bounds = reference.index_scores(index, state, query, length, margin=index.candidate_margin)
    lists = select(bounds, budget=refine * budget, scale=scale / 2, **rest)
    is_candidate = torch.from_numpy(oracles.attended_by(lists, query.shape[1], length))
    scores = reference.exact_scores(query.float(), keys)
    if not by_keys:
        every = torch.arange(length).expand(*keys.shape[:2], query.shape[2], length)
        grouped = query.float().unflatten(1, (num_kv_heads, -1)).transpose(2, 3)
        scores = index.refined_scores(state, grouped, every).transpose(2, 3).flatten(1, 2)
    return scores, is_candidate


@given(
    problem=problems(longest=400, head_dims=DIMS, kinds=(gaussian, channel_offsets)),
    data=st.data(),
    refine=st.integers(2, 6),
    budget=st.sampled_from((4, 10, 40, 500)),
    per_query_head=st.booleans(),
)
def test_a_refined_selection_is_that_of_two_stages(
    problem: Problem, data: st.DataObject, refine: int, budget: int, per_query_head: bool
) -> None:
    """By codes or by keys. With a candidate for every token the second stage alone decides."""
    query, keys = problem.query, problem.keys
    length, scale = keys.shape[2], query.shape[3] ** -0.5
    index = data.draw(indexes(head_dims=(query.shape[3],), with_codes=True))
    by_keys = not getattr(index, "refine_bits", 0)
    state = build(index, keys)
    rest: dict[str, Any] = {"budget": budget, "sinks": 1, "recent": 3, "scale": scale}
    rest["per_query_head"] = per_query_head
    found = reference.select_from_index(
        index, state, query, length, visible=problem.visible, refine=refine,
        keys=keys if by_keys else None, **rest,
    )  # fmt: skip
    scores, is_candidate = two_stages(
        index, state, problem, by_keys, refine, budget, per_query_head, scale
    )
    if refine * budget >= length:
        assert (is_candidate == visible_of(problem)).all()
    scores = scores.nan_to_num().masked_fill(~is_candidate, -torch.inf)
    expected = select(scores, num_kv_heads=keys.shape[1], visible=visible_of(problem), **rest)
    agree = found == expected
    if agree.all():
        return
    # Sums in another order may order two tokens otherwise that are as good as equal.
    lists = oracles.attended_by(found, query.shape[1], length)
    others = oracles.attended_by(expected, query.shape[1], length)
    assert (lists <= is_candidate.numpy()).all()
    weights = scores.mul(scale).softmax(-1).numpy()
    assert np.abs((weights * lists).sum(-1) - (weights * others).sum(-1)).max() <= 1e-5


@dataclass(frozen=True)
class GivenScores:
    """Stands in for an index: scores ``[rows, S]`` by the row that a query's channel 0 names."""

    first: Tensor
    second: Tensor
    candidate_margin: float = 1.5

    def scores(self, state: list[Tensor], query: Tensor, length: int, *, margin: float) -> Tensor:
        assert (length, margin) == (self.first.shape[1], self.candidate_margin)
        return self.first[query[..., 0].long()]

    def refined_scores(self, state: list[Tensor], query: Tensor, tokens: Tensor) -> Tensor:
        every = self.second[query[..., 0].long()]  # [B, H, R, G, S]
        return every.gather(4, tokens.unsqueeze(3).expand(*every.shape[:4], -1))


def scores_with_ties(shape: tuple[int, ...], num_kinds: int, generator: torch.Generator) -> Tensor:
    """Float64 ``[B, Hq, T, S]`` where tokens of a kind are equal for every head."""
    kinds = 3 * torch.randn(*shape[:3], num_kinds, generator=generator, dtype=torch.float64)
    of_tokens = torch.randperm(shape[3], generator=generator) % num_kinds
    return kinds[..., of_tokens]


@given(
    shape=shapes(longest=150, head_dims=(8,)),
    how=st.sampled_from(("KV head", "query head", "query head, by keys")),
    data=st.data(),
    window=st.tuples(st.integers(0, 6), st.integers(1, 6)),
    beyond=st.integers(0, 20) | st.integers(0, 200),
    refine=st.integers(2, 6),
    scale=st.sampled_from((0.3, 1.0)),
    seed=seeds(),
)
def test_a_refined_selection_is_that_of_twenty_lines_of_numpy(
    shape: Shape,
    how: str,
    data: st.DataObject,
    window: tuple[int, int],
    beyond: int,
    refine: int,
    scale: float,
    seed: int,
) -> None:
    """Token for token and tie for tie, whatever the two scorings say and whoever sees what."""
    generator = torch.Generator().manual_seed(seed)
    visible = data.draw(masks(shape.batch_size, shape.num_queries, shape.length))
    rows, size = shape.query[:3], (*shape.query[:3], shape.length)
    num_kinds = st.integers(1, shape.length)
    first, second = (scores_with_ties(size, data.draw(num_kinds), generator) for _ in "12")
    query = torch.arange(math.prod(rows)).view(*rows, 1).float()
    keys = None
    if how.endswith("keys"):
        # Whole numbers, whose products are exact; that of channel 0 is 0.
        query, keys = (
            torch.randint(-2, 3, axes, generator=generator).float()
            for axes in (shape.query, shape.keys)
        )
        query[..., 0], keys[..., 0] = torch.arange(math.prod(rows)).view(rows), 0
        every = keys.double().repeat_interleave(shape.num_groups, 1)
        second = query.double() @ every.transpose(2, 3)
    index: Any = GivenScores(first.flatten(0, 2), second.flatten(0, 2))
    sinks, recent = window
    rest: dict[str, Any] = {"budget": sinks + recent + beyond, "refine": refine, "scale": scale}
    rest |= {"sinks": sinks, "recent": recent}
    found = reference.select_from_index(
        index,
        [torch.empty(shape.keys)],
        query,
        shape.length,
        per_query_head=how != "KV head",
        visible=visible,
        keys=keys,
        **rest,
    )
    if visible is None:
        visible = causal_visible(shape.num_queries, shape.length, query.device)
    expected = oracles.two_stages(
        first.numpy(),
        second.numpy(),
        visible.expand(shape.batch_size, 1, shape.num_queries, shape.length).numpy(),
        num_lists=shape.num_kv_heads if how == "KV head" else rows[1],
        **rest,
    )
    assert found.tolist() == expected.tolist()


@given(
    data=st.data(),
    problem=problems(longest=200, head_dims=DIMS, dtypes=(torch.float64,), kinds=(gaussian,)),
    per_query_head=st.booleans(),
    size=st.integers(1, 210),
    seed=seeds(),
)
def test_attention_mass_is_the_share_of_weight_on_the_list(
    data: st.DataObject, problem: Problem, per_query_head: bool, size: int, seed: int
) -> None:
    query, keys = problem.query, problem.keys
    lists = draw_lists(problem, per_query_head, size, torch.Generator().manual_seed(seed))
    chosen = data.draw(options(query.shape[1], query.shape[3]))
    chosen.pop("sink_logits", None)
    mass = reference.attention_mass(query, keys, lists, visible=problem.visible, **chosen)
    # The weight on a set is what attention gives it when it alone has value 1.
    attended = oracles.attended_by(lists, query.shape[1], keys.shape[2])
    visible = visible_of(problem).expand(*query.shape[:3], -1).numpy()
    expected = np.zeros(mass.shape)
    for b, h, t in np.ndindex(*mass.shape):
        one = (slice(b, b + 1), slice(h, h + 1), slice(t, t + 1))
        kv_head = slice(
            h * keys.shape[1] // query.shape[1], h * keys.shape[1] // query.shape[1] + 1
        )
        expected[b, h, t] = oracles.attention(
            oracles.exact(query)[one],
            oracles.exact(keys)[b : b + 1, kv_head],
            attended[b, h, t][None, None, :, None].astype(float),
            visible[one],
            **for_oracle(chosen),
        ).item()
    assert np.abs(oracles.exact(mass) - expected).max() <= 1e-12
    assert ((mass >= 0) & (mass <= 1 + 1e-12)).all()


@given(problem=problems(longest=200, head_dims=DIMS, dtypes=(torch.float64,), kinds=(gaussian,)))
def test_all_tokens_hold_all_of_the_mass(problem: Problem) -> None:
    length = problem.keys.shape[2]
    lists = draw_lists(problem, False, length, torch.Generator().manual_seed(0))
    mass = reference.attention_mass(
        problem.query, problem.keys, lists, scale=0.3, visible=problem.visible
    )
    sees = visible_of(problem).any(-1).expand_as(mass)
    assert ((mass - sees.double()).abs() <= 1e-12).all()
