"""Selection keeps sinks and recents, takes the best of the rest, and ties go to the lowest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch.errors import ConfigError
from fierpatch.select import attention_weights, causal_visible, select, select_tokens, top_k
from strategies import DTYPES, budgets, generators, lengths, masks, seeds

PRIORITIES = ("distinct", "ties", "constant", "weights")


@st.composite
def priorities(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Scores or weights to select by: distinct, with many ties, all equal, or a sharp softmax."""
    kind = draw(st.sampled_from(PRIORITIES))
    dtype = draw(st.sampled_from((*DTYPES, torch.float64)))
    generator = draw(generators())
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if kind == "constant":
        return torch.full(shape, 0.25, dtype=dtype)
    priority = torch.randn(shape, generator=generator)
    return (priority if kind == "distinct" else (20 * priority).softmax(-1)).to(dtype)


@st.composite
def selections(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int, int, int]:
    """Priority ``[B, H, T, S]``, a mask, and a budget that holds its sinks and recents."""
    batch_size, heads, num_queries = (draw(st.integers(1, 3)) for _ in range(3))
    length = max(draw(lengths(600)), num_queries)
    priority = draw(priorities((batch_size, heads, num_queries, length)))
    visible = draw(masks(batch_size, num_queries, length))
    budget = draw(budgets())
    sinks = draw(st.integers(0, min(budget, 20)))
    recent = draw(st.integers(0, min(budget - sinks, 70)))
    return priority, visible, budget, sinks, recent


def every_row(visible: Tensor | None, priority: Tensor) -> Tensor:
    """The mask in full, ``[B, H, T, S]``."""
    if visible is None:
        return torch.ones_like(priority, dtype=torch.bool)
    return visible.expand_as(priority)


@given(selections())
@example((torch.zeros(1, 1, 1, 5), torch.tensor([[[[True]]]]), 3, 1, 1))  # one flag a query
def test_selection_equals_a_sort(case: tuple[Tensor, Tensor | None, int, int, int]) -> None:
    priority, visible, budget, sinks, recent = case
    chosen = select_tokens(priority, budget=budget, sinks=sinks, recent=recent, visible=visible)
    assert chosen.dtype == torch.int64
    assert chosen.shape == (*priority.shape[:3], min(budget, priority.shape[3]))
    mask = every_row(visible, priority)
    for row in np.ndindex(*priority.shape[:3]):
        expected = oracles.select_tokens(
            priority[row].tolist(), mask[row].tolist(), budget=budget, sinks=sinks, recent=recent
        )
        assert chosen[row].tolist() == expected


@given(selections())
def test_exactly_the_budget_is_chosen_of_what_is_visible(
    case: tuple[Tensor, Tensor | None, int, int, int],
) -> None:
    priority, visible, budget, sinks, recent = case
    chosen = select_tokens(priority, budget=budget, sinks=sinks, recent=recent, visible=visible)
    mask = every_row(visible, priority)
    used = chosen >= 0
    assert torch.equal(used.sum(-1), mask.sum(-1).clamp_max(budget))
    assert torch.equal(used, used.cummin(-1).values), "unused slots are at the end"
    assert mask.gather(-1, chosen.clamp_min(0))[used].all(), "only visible tokens"
    ascending = chosen.diff(dim=-1) > 0
    assert ascending[used[..., 1:]].all()


@given(selections(), st.integers(1, 300))
def test_a_larger_budget_chooses_a_superset(
    case: tuple[Tensor, Tensor | None, int, int, int], more: int
) -> None:
    priority, visible, budget, sinks, recent = case
    length = priority.shape[3]
    fewer, larger = (
        oracles.attended_by(
            select_tokens(priority, budget=size, sinks=sinks, recent=recent, visible=visible),
            priority.shape[1],
            length,
        )
        for size in (budget, budget + more)
    )
    assert (fewer <= larger).all()


@given(selections())
def test_selecting_leaves_its_input_alone(
    case: tuple[Tensor, Tensor | None, int, int, int],
) -> None:
    priority, visible, budget, sinks, recent = case
    before = priority.clone()
    select_tokens(priority, budget=budget, sinks=sinks, recent=recent, visible=visible)
    assert torch.equal(priority, before)


@given(selections(), st.sampled_from((torch.nan, torch.inf, -torch.inf)))
def test_what_is_invisible_has_no_say(
    case: tuple[Tensor, Tensor | None, int, int, int], bad: float
) -> None:
    priority, visible, budget, sinks, recent = case
    assume(visible is not None)
    assert visible is not None
    spoilt = priority.masked_fill(~visible, bad)
    chosen, expected = (
        select_tokens(x, budget=budget, sinks=sinks, recent=recent, visible=visible)
        for x in (spoilt, priority)
    )
    assert torch.equal(chosen, expected)


@given(selections())
def test_rows_are_selected_on_their_own(
    case: tuple[Tensor, Tensor | None, int, int, int],
) -> None:
    priority, visible, budget, sinks, recent = case
    chosen = select_tokens(priority, budget=budget, sinks=sinks, recent=recent, visible=visible)
    flipped = select_tokens(
        priority.flip(0, 1, 2),
        budget=budget,
        sinks=sinks,
        recent=recent,
        visible=None if visible is None else visible.flip(0, 2),
    )
    assert torch.equal(flipped.flip(0, 1, 2), chosen)


@given(length=lengths(300), k=st.integers(1, 300), seed=seeds())
def test_moving_the_tokens_moves_the_choice(length: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(length, generator=generator)
    priority = torch.randperm(length, generator=generator).float()
    chosen = select_tokens(priority.view(1, 1, 1, -1), budget=k, recent=0)
    moved = select_tokens(priority[order].view(1, 1, 1, -1), budget=k, recent=0)
    assert torch.equal(order[moved.flatten()].sort().values, chosen.flatten())


@given(length=lengths(300), budget=budgets(), data=st.data())
def test_equal_priorities_fill_up_from_the_lowest_position(
    length: int, budget: int, data: st.DataObject
) -> None:
    recent = data.draw(st.integers(0, budget))
    chosen = select_tokens(torch.zeros(1, 1, 1, length), budget=budget, recent=recent).flatten()
    tail = min(recent, length)
    head = min(budget, length) - tail
    assert chosen.tolist() == [*range(head), *range(length - tail, length)]


def test_the_newest_token_is_chosen_by_default() -> None:
    assert select_tokens(torch.tensor([[[[9.0, 8.0, 1.0]]]]), budget=2).tolist() == [[[[0, 2]]]]


def test_sinks_and_recents_are_counted_among_visible_tokens() -> None:
    visible = torch.tensor([False, False, True, True, True, True, False])
    priority = torch.tensor([9.0, 9, 0, 1, 2, 0, 9]).view(1, 1, 1, 7)
    chosen = select_tokens(priority, budget=3, sinks=1, recent=1, visible=visible)
    assert chosen.tolist() == [[[[2, 4, 5]]]]


def test_a_row_that_sees_nothing_chooses_nothing() -> None:
    priority = torch.rand(2, 1, 1, 4)
    visible = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, 4)
    chosen = select_tokens(priority, budget=2, visible=visible)
    assert (chosen[0] >= 0).all()
    assert (chosen[1] == -1).all()


@pytest.mark.parametrize(("budget", "sinks", "recent"), [(1, 1, 1), (19, 4, 16), (3, 4, 0)])
def test_a_budget_that_cannot_hold_sinks_and_recents_is_refused(
    budget: int, sinks: int, recent: int
) -> None:
    """Otherwise the newest token would be the first to go."""
    with pytest.raises(ConfigError, match=rf"budget={budget} .* {sinks} \+ {recent}"):
        select_tokens(torch.rand(1, 1, 1, 100), budget=budget, sinks=sinks, recent=recent)


@given(data=st.data(), length=lengths(300), k=st.integers(1, 320))
def test_top_k_never_takes_minus_infinity(data: st.DataObject, length: int, k: int) -> None:
    priority = data.draw(priorities((2, length)))
    chance = data.draw(st.sampled_from((0.0, 0.3, 0.97, 1.0)))
    dark = torch.rand((2, length), generator=data.draw(generators())) < chance
    priority = priority.masked_fill(dark, -torch.inf)
    chosen = top_k(priority, k)
    assert chosen.shape == (2, k)
    for row in range(2):
        expected = oracles.select_tokens(
            priority[row].tolist(), (~dark[row]).tolist(), budget=k, sinks=0, recent=0
        )
        assert chosen[row].tolist() == expected + [-1] * (k - len(expected))


def test_top_k_takes_infinity_first() -> None:
    priority = torch.tensor([0.0, torch.inf, 1.0, torch.inf])
    assert top_k(priority, 3).tolist() == [1, 2, 3]


@st.composite
def scored(draw: st.DrawFn, *, longest: int = 200) -> tuple[Tensor, int, Tensor | None]:
    """Scores float64 ``[B, H * G, T, S]`` without ties, H, and a mask."""
    batch_size, heads, num_queries = (draw(st.integers(1, 2)) for _ in range(3))
    num_groups = draw(st.sampled_from((1, 2, 3, 4, 7)))
    length = max(draw(lengths(longest)), num_queries)
    shape = (batch_size, heads * num_groups, num_queries, length)
    scores = torch.randn(shape, generator=draw(generators()), dtype=torch.float64)
    return scores, heads, draw(masks(batch_size, num_queries, length))


options: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"scale": st.sampled_from((1.0, 0.125, 3.0)), "softcap": st.sampled_from((0.0, 0.5, 20.0))}
)


@given(case=scored(), options=options, has_sinks=st.booleans(), seed=seeds())
def test_weights_are_the_mean_softmax_of_the_group(
    case: tuple[Tensor, int, Tensor | None],
    options: dict[str, Any],
    has_sinks: bool,
    seed: int,
) -> None:
    scores, heads, visible = case
    sink_logits = (
        torch.randn(scores.shape[1], generator=torch.Generator().manual_seed(seed))
        if has_sinks
        else None
    )
    weights = attention_weights(
        scores, num_kv_heads=heads, sink_logits=sink_logits, visible=visible, **options
    )
    expected = oracles.attention_weights(
        oracles.exact(scores),
        every_row(visible, scores[:, :1]).numpy(),
        num_kv_heads=heads,
        sink_logits=None if sink_logits is None else oracles.exact(sink_logits),
        **options,
    )
    assert weights.dtype == torch.float64
    assert np.abs(oracles.exact(weights) - expected).max() <= 1e-14
    if visible is not None:
        assert (weights[~every_row(visible, weights)] == 0).all()
    if not has_sinks:
        sees = every_row(visible, weights).any(-1)
        assert ((weights.sum(-1) - sees.double()).abs() <= 1e-13).all()


@given(num_groups=st.integers(1, 16), length=lengths(longest=300), seed=seeds())
@example(num_groups=6, length=33, seed=0)
def test_equal_scores_weigh_the_same_wherever_they_are(
    num_groups: int, length: int, seed: int
) -> None:
    """To the last bit: else how a sum is vectorized would decide, and not the place of a token."""
    scores = torch.randn(1, num_groups, 1, 1, generator=torch.Generator().manual_seed(seed))
    sink = torch.randn(num_groups, generator=torch.Generator().manual_seed(seed + 1))
    weights = attention_weights(
        scores.repeat(1, 1, 1, length), num_kv_heads=1, scale=1.0, sink_logits=sink
    )
    assert (weights == weights[..., :1]).all()


@given(case=scored(), options=options, budget=budgets(), per_query_head=st.booleans())
def test_selecting_from_scores_equals_weights_then_a_sort(
    case: tuple[Tensor, int, Tensor | None],
    options: dict[str, Any],
    budget: int,
    per_query_head: bool,
) -> None:
    scores, heads, visible = case
    recent = min(budget, 3)
    chosen = select(
        scores,
        num_kv_heads=heads,
        budget=budget,
        recent=recent,
        per_query_head=per_query_head,
        visible=visible,
        **options,
    )
    mask = every_row(visible, scores[:, :1]).numpy()
    if per_query_head:
        priority = oracles.exact(scores)
    else:
        priority = oracles.attention_weights(
            oracles.exact(scores), mask, num_kv_heads=heads, **options
        )
    assert chosen.shape[:3] == priority.shape[:3]
    for b, h, t in np.ndindex(*priority.shape[:3]):
        expected = oracles.select_tokens(
            list(priority[b, h, t]), list(mask[b, 0, t]), budget=budget, sinks=0, recent=recent
        )
        assert chosen[b, h, t].tolist() == expected


@given(num_queries=st.integers(1, 9), before=st.integers(0, 40))
def test_the_newest_queries_see_up_to_themselves(num_queries: int, before: int) -> None:
    length = before + num_queries
    visible = causal_visible(num_queries, length, torch.device("cpu"))
    assert visible.shape == (1, 1, num_queries, length)
    for query in range(num_queries):
        expected = [token <= before + query for token in range(length)]
        assert visible[0, 0, query].tolist() == expected
