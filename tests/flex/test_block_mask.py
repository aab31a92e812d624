"""A block mask visits every allowed cell, keeps its shapes and addresses, and never grows as S²."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fierpatch.errors import ConfigError, ShapeError
from fierpatch.flex import (
    BLOCK_SIZES,
    QueryLayout,
    SelectionMask,
    block_mask_of,
    causal_mask_mod,
    ordered_blocks,
    selected_blocks_mask_mod,
)
from flex.cases import Case, cases, lists_as_cells, random_lists, visited

every_block_size = st.sampled_from(BLOCK_SIZES)


def lists_of(case: Case, num_lists: int, width: int) -> Tensor:
    sizes = (case.batch_size, num_lists, case.num_queries, case.length, width)
    return random_lists(*sizes, case.generator)


def check(case: Case, mask: SelectionMask, lists: Tensor) -> None:
    """Exact by its mask_mod, and by its blocks those that hold a token and no others."""
    expected = lists_as_cells(lists, case.num_query_heads, case.length)
    assert torch.equal(case.cells(mask.mask_mod), expected)
    cells = visited(mask.block_mask)
    num_rows, size = case.num_groups * case.num_queries, mask.block_size
    of_head = expected.reshape(case.batch_size, case.num_kv_heads, num_rows, case.length)
    assert not (of_head & ~cells).any()
    padded = torch.nn.functional.pad(of_head.any(2), (0, -case.length % size))
    assert torch.equal(mask.num_blocks[..., 0], padded.unflatten(2, (-1, size)).any(3).sum(2))


@given(
    case=cases(is_folded=True),
    per_query_head=st.booleans(),
    block_size=every_block_size,
    width=st.integers(1, 60),
    in_order=st.booleans(),
)
@example(  # all of a word's bits, the last of which is its sign
    case=Case(1, 1, 1, 1, 64, True, 0),
    per_query_head=False,
    block_size=16,
    width=64,
    in_order=True,
)
def test_a_mask_of_tokens_visits_what_it_allows(
    case: Case, per_query_head: bool, block_size: int, width: int, in_order: bool
) -> None:
    """And goes on doing so when it is updated: nothing of an earlier selection stays."""
    num_lists = case.num_query_heads if per_query_head else case.num_kv_heads
    mask = SelectionMask.empty(
        case.layout,
        batch_size=case.batch_size,
        num_lists=num_lists,
        length=case.length,
        block_size=block_size,
    )
    addresses = [tensor.data_ptr() for tensor in (mask.words, mask.num_blocks, mask.block_indices)]
    lists = lists_of(case, num_lists, width)
    for chosen in (lists, lists.flip(2), torch.full_like(lists, -1), lists):
        shuffled = chosen if in_order else chosen.flip(3)
        mask.update(shuffled, is_ascending=in_order)
        check(case, mask, chosen)
        fresh = SelectionMask.of(case.layout, chosen, length=case.length, block_size=block_size)
        check(case, fresh, chosen)
    now = [tensor.data_ptr() for tensor in (mask.words, mask.num_blocks, mask.block_indices)]
    assert now == addresses


@given(case=cases(is_folded=True), width=st.integers(1, 60))
def test_lists_of_any_integers_give_the_same_mask(case: Case, width: int) -> None:
    lists = lists_of(case, case.num_kv_heads, width)
    masks = [
        SelectionMask.of(case.layout, lists.to(dtype), length=case.length)
        for dtype in (torch.int64, torch.int32)
    ]
    assert torch.equal(masks[0].words, masks[1].words)
    assert torch.equal(masks[0].num_blocks, masks[1].num_blocks)


def test_a_mask_of_a_million_tokens_takes_memory_by_its_length_not_its_square() -> None:
    layout = QueryLayout(4, 1, num_folded=4)
    mask = SelectionMask.empty(layout, batch_size=1, num_lists=1, length=1 << 20)
    mask.update(torch.arange(0, 1 << 20, 1 << 10).view(1, 1, 1, -1), is_ascending=True)
    assert int(mask.num_blocks) == 1024
    assert sum(t.nbytes for t in (mask.words, mask.num_blocks, mask.block_indices)) < 1 << 19


@given(
    lead=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    count=st.integers(1, 40),
    chance=st.sampled_from((0.0, 0.2, 0.5, 1.0)),
    seed=st.integers(0, 99),
)
def test_blocks_are_listed_in_order(lead: list[int], count: int, chance: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    is_chosen = torch.rand(*lead, count, generator=generator) < chance
    num_blocks, listed = ordered_blocks(is_chosen)
    assert listed.shape == is_chosen.shape
    rows = zip(is_chosen.view(-1, count), num_blocks.view(-1), listed.view(-1, count), strict=True)
    for row, number, blocks in rows:
        expected = row.nonzero()[:, 0]
        assert blocks.tolist() == expected.tolist() + [0] * (count - len(expected))
        assert int(number) == len(expected)


@given(case=cases(is_folded=False), chance=st.sampled_from((0.0, 0.3, 1.0)), data=st.data())
def test_a_mask_of_blocks_visits_its_blocks(case: Case, chance: float, data: st.DataObject) -> None:
    """Partial and full ones, at the ends of queries and keys too."""
    block_size = (data.draw(st.sampled_from((1, 3, 128))), data.draw(every_block_size))
    shape = (-(-case.num_queries // block_size[0]), -(-case.length // block_size[1]))
    lead = (case.batch_size, case.num_query_heads)
    chosen = torch.rand(*lead, *shape, generator=case.generator) < chance
    is_full = chosen & (torch.rand(chosen.shape, generator=case.generator) < 0.5)
    lengths = (case.num_queries, case.length)
    mask_mod = selected_blocks_mask_mod(case.layout, chosen, block_size=block_size)
    allowed = case.cells(mask_mod)
    for full in (None, is_full):
        partial = chosen if full is None else chosen & ~full
        mask = block_mask_of(
            partial, mask_mod, seq_lengths=lengths, block_size=block_size, is_full=full
        )
        assert torch.equal(visited(mask), allowed)


@pytest.mark.parametrize("block_size", [0, 1, 8, 24, 48, 96, 256, -16])
def test_a_block_that_no_kernel_takes_is_refused(block_size: int) -> None:
    layout, lists = QueryLayout(2, 1, num_folded=2), torch.zeros(1, 1, 1, 4, dtype=torch.int64)
    refused = pytest.raises(ConfigError, match=f"block_size={block_size} .*16, 32, 64, 128")
    with refused:
        SelectionMask.of(layout, lists, length=9, block_size=block_size)
    with refused:
        SelectionMask.empty(layout, batch_size=1, num_lists=1, length=9, block_size=block_size)


def test_lists_that_do_not_fit_are_refused_by_shape() -> None:
    layout = QueryLayout(4, 2, num_folded=2)
    mask = SelectionMask.empty(layout, batch_size=1, num_lists=2, length=40)
    for shape in ((1, 2, 1, 5), (1, 3, 2, 5), (2, 2, 5)):
        with pytest.raises(ShapeError, match="2 heads and 2 queries"):
            mask.update(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"\(1, 2, 2\)"):
        mask.update(torch.zeros(3, 2, 2, 5, dtype=torch.int64))


def test_maps_that_do_not_cover_the_lengths_are_refused() -> None:
    mask_mod = causal_mask_mod(QueryLayout(2, 9))
    with pytest.raises(ShapeError, match=r"is_partial .*want \[B, H, 2, 3\]"):
        block_mask_of(
            torch.ones(1, 2, 2, 2, dtype=torch.bool),
            mask_mod,
            seq_lengths=(9, 33),
            block_size=(8, 16),
        )
