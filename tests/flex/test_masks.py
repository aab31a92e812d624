"""A mask_mod allows the cells of its dense mask, cell by cell, folded or apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import and_masks, or_masks

from fierpatch.errors import ShapeError
from fierpatch.flex import (
    QueryLayout,
    SelectionMask,
    causal_mask_mod,
    padding_mask_mod,
    selected_blocks_mask_mod,
    selected_mask_mod,
    sinks_and_recent_mask_mod,
)
from fierpatch.select import select_tokens
from flex.cases import Case, cases, lists_as_cells, random_lists
from strategies import left_padded_visible


@given(case=cases(), offset=st.integers(0, 300), is_tensor=st.booleans())
def test_causal(case: Case, offset: int, is_tensor: bool) -> None:
    """A chunk of queries at an offset, given as a number or on the device."""
    mask_mod = causal_mask_mod(case.layout, offset=torch.tensor(offset) if is_tensor else offset)
    position = torch.arange(offset, offset + case.num_queries)
    expected = torch.arange(case.length) <= position[:, None]
    cells = case.cells(mask_mod)
    assert torch.equal(cells, expected.expand_as(cells))


@given(case=cases())
def test_padding_may_be_anywhere(case: Case) -> None:
    is_token = torch.rand(case.batch_size, case.length, generator=case.generator) < 0.7
    cells = case.cells(padding_mask_mod(is_token))
    assert torch.equal(cells, is_token[:, None, None].expand_as(cells))


@given(case=cases(), sinks=st.integers(0, 20), recent=st.integers(1, 40), data=st.data())
def test_sinks_and_recent_are_what_selection_keeps(
    case: Case, sinks: int, recent: int, data: st.DataObject
) -> None:
    """Behind the left padding of each row, which is never a sink."""
    size, length = case.batch_size, case.length
    padding = data.draw(st.lists(st.integers(0, length), min_size=size, max_size=size))
    offset = length - case.num_queries
    visible = left_padded_visible(padding, case.num_queries, length)
    first = torch.tensor(padding)
    mask_mod = and_masks(
        causal_mask_mod(case.layout, offset=offset),
        padding_mask_mod(torch.arange(length) >= first[:, None]),
        sinks_and_recent_mask_mod(
            case.layout, sinks=sinks, recent=recent, offset=offset, first=first
        ),
    )
    kept = select_tokens(
        torch.zeros(size, 1, case.num_queries, length),
        budget=sinks + recent,
        sinks=sinks,
        recent=recent,
        visible=visible,
    )
    cells = case.cells(mask_mod)
    assert torch.equal(cells, lists_as_cells(kept, case.num_query_heads, length))


@given(case=cases(), per_query_head=st.booleans(), width=st.integers(1, 60))
def test_selected_tokens(case: Case, per_query_head: bool, width: int) -> None:
    """Of a list a KV head or a query head, and of each query its own."""
    num_lists = case.num_query_heads if per_query_head else case.num_kv_heads
    lists = random_lists(
        case.batch_size, num_lists, case.num_queries, case.length, width, case.generator
    )
    layout = QueryLayout(num_lists, case.num_queries)
    words = SelectionMask.of(layout, lists, length=case.length).words
    expected = lists_as_cells(lists, case.num_query_heads, case.length)
    assert torch.equal(case.cells(selected_mask_mod(case.layout, words)), expected)


@given(case=cases(), query_size=st.integers(1, 5), key_size=st.sampled_from((1, 16, 64)))
def test_selected_blocks(case: Case, query_size: int, key_size: int) -> None:
    shape = (-(-case.num_queries // query_size), -(-case.length // key_size))
    lead = (case.batch_size, case.num_kv_heads)
    chosen = torch.rand(*lead, *shape, generator=case.generator) < 0.5
    mask_mod = selected_blocks_mask_mod(case.layout, chosen, block_size=(query_size, key_size))
    cells = chosen.repeat_interleave(query_size, 2).repeat_interleave(key_size, 3)
    cells = cells[:, :, : case.num_queries, : case.length]
    assert torch.equal(case.cells(mask_mod), cells.repeat_interleave(case.num_groups, 1))


@given(case=cases())
def test_masks_combine(case: Case) -> None:
    causal = causal_mask_mod(case.layout, offset=case.length - case.num_queries)
    ends = sinks_and_recent_mask_mod(case.layout, sinks=3, recent=5, offset=case.length - 1)
    both, either = case.cells(and_masks(causal, ends)), case.cells(or_masks(causal, ends))
    one, other = case.cells(causal), case.cells(ends)
    assert torch.equal(both, one & other)
    assert torch.equal(either, one | other)


def test_what_does_not_fit_is_refused_by_name() -> None:
    layout = QueryLayout(6, 1, num_folded=3)
    with pytest.raises(ShapeError, match="6 query heads do not fold by 4"):
        QueryLayout(6, 1, num_folded=4)
    with pytest.raises(ShapeError, match=r"is_token of shape \(3,\).*\[B, S\]"):
        padding_mask_mod(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"first of shape \(1, 3\)"):
        sinks_and_recent_mask_mod(layout, sinks=1, recent=1, first=torch.ones(1, 3))
    with pytest.raises(ShapeError, match="words"):
        selected_mask_mod(layout, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ShapeError, match="is_chosen"):
        selected_blocks_mask_mod(layout, torch.zeros(3, dtype=torch.bool), block_size=(1, 1))
    words = torch.zeros(1, 4, 1, 1, dtype=torch.int32)
    with pytest.raises(ShapeError, match="6 query heads do not share 4 lists"):
        Case(1, 2, 3, 1, 32, True, 0).cells(selected_mask_mod(layout, words))
