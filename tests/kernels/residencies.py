"""Hot sets by kernels beside those in tensors, and attention over the rows of both."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fierpatch.hot_set import EMPTY, MISSING, NEEDED, HotSet
from fierpatch.hot_set import fetch as fetch_reference
from fierpatch.hot_set import place as place_reference
from fierpatch.rows import split
from kernels.tensors import words
from strategies import seeds


@dataclass(frozen=True)
class Steps:
    """Lists of `width` tokens, a step each, for hot sets of `num_rows` rows."""

    num_rows: int
    width: int
    num_tokens: int
    batch_size: int = 1
    num_kv_heads: int = 1
    lists_per_kv_head: int = 1
    head_dim: int = 64
    value_head_dim: int = 64
    num_steps: int = 4
    fill: float = 0.8  # the share of slots in use
    drift: int = 8  # tokens by which a list moves on
    candidates: int = 0  # tokens to prefetch after a step
    # How many tokens a crop leaves before a step, from the second on and in turn; None for no crop.
    crops: tuple[int | None, ...] = ()
    more_room: int = 0  # tokens by which the capacity grows before the second step
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def num_lists(self) -> int:
        return self.num_kv_heads * self.lists_per_kv_head

    def crop_before(self, step: int) -> int | None:
        return self.crops[(step - 1) % len(self.crops)] if step and self.crops else None


@st.composite
def any_steps(draw: st.DrawFn, *, longest: int = 80) -> Steps:
    width = draw(st.integers(1, longest))
    head_dim = draw(st.sampled_from((64, 80, 128)))
    num_tokens = draw(st.integers(width, 4 * width + 3))
    return Steps(
        num_rows=width + draw(st.sampled_from((0, 1, width, 3 * width))),
        width=width,
        num_tokens=num_tokens,
        batch_size=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 2)),
        lists_per_kv_head=draw(st.sampled_from((1, 1, 3))),
        head_dim=head_dim,
        value_head_dim=draw(st.sampled_from((head_dim, 5, 48))),
        fill=draw(st.sampled_from((0.0, 0.3, 0.9, 1.0))),
        drift=draw(st.sampled_from((0, 1, 8, 1000))),
        candidates=draw(st.sampled_from((0, 0, 1, 40, 200))),
        crops=tuple(draw(st.lists(st.none() | st.integers(0, num_tokens), max_size=3))),
        more_room=draw(st.sampled_from((0, 0, 1, 512))),
        dtype=draw(st.sampled_from((torch.float32, torch.float16))),
        seed=draw(seeds()),
    )


def lists_of(case: Steps, step: int, width: int, generator: torch.Generator) -> Tensor:
    """Distinct tokens in any order and in random slots; a window that moves on."""
    lists = torch.full((case.batch_size, case.num_lists, 1, width), EMPTY)
    for b in range(case.batch_size):
        for number in range(case.num_lists):
            near = torch.randperm(min(2 * width, case.num_tokens), generator=generator)
            chosen = (near[:width] + step * case.drift) % case.num_tokens
            slots = torch.randperm(width, generator=generator)[: len(chosen)]
            slots = slots[: round(case.fill * len(slots))]
            lists[b, number, 0, slots] = chosen[: len(slots)]
    return lists


def check_residency(case: Steps, device: torch.device) -> None:
    """State, tally and fetched rows are those of the tensors; attention is that over all rows."""
    from fierpatch.kernels import append, attention, residency

    generator = torch.Generator().manual_seed(case.seed)
    width = case.head_dim + case.value_head_dim
    shape = (case.num_tokens, case.batch_size, case.num_kv_heads, width)
    paired = torch.randn(shape, generator=generator).to(case.dtype)
    heads = case.num_lists * 2
    sizes = (case.num_rows, case.num_tokens, case.batch_size, case.num_lists, width)
    expected = HotSet.empty(*sizes, paired)
    held = paired.to(device)
    found = HotSet.empty(*sizes, held)
    found.rows.fill_(torch.nan)
    expected.rows.fill_(torch.nan)
    counters = append.new_counters(device)
    counters[0] = case.num_tokens
    arrivals = torch.zeros(case.batch_size * case.num_lists, dtype=torch.int32, device=device)
    for step in range(case.num_steps):
        if (kept := case.crop_before(step)) is not None:
            for hot in (expected, found):
                hot.forget(kept)
            # Others come in the place of those that were forgotten.
            paired[kept:] = torch.randn(paired[kept:].shape, generator=generator)
            held.copy_(paired)
        if step == 1 and case.more_room:
            nothing = paired.new_full((case.more_room, *shape[1:]), torch.nan)
            paired = torch.cat((paired, nothing))
            held = paired.to(device)
            expected, found = (hot.resize(len(paired)) for hot in (expected, found))
        lists = lists_of(case, step, case.width, generator)
        query = torch.randn(case.batch_size, heads, 1, case.head_dim, generator=generator)
        query = query.to(device, case.dtype)
        options = {"scale": 0.1, "counters": counters, "arrivals": arrivals}
        views = split([held], case.head_dim)
        own = place_reference(expected, lists)
        without = hide_hits(held, lists, own)
        output = attention.gather_attention(
            query,
            *split([without], case.head_dim),
            lists.to(device),
            hot=found,
            **options,
        )
        fetch_reference(expected, own, lists, paired)
        plain = attention.gather_attention(query, *views, lists.to(device), **options)
        assert torch.equal(output, plain)
        flat = attention.gather_attention(
            query, *(x.contiguous() for x in views), lists.to(device), **options
        )
        assert torch.equal(plain, flat)
        if case.candidates:
            more = lists_of(case, step + 1, case.candidates, generator)
            stored = case.num_tokens - case.num_tokens // 5
            fewer = torch.full_like(counters[:1], stored)
            check_nothing_is_fetched(found, more.to(device), held)
            placed = residency.place(found, more.to(device), fewer)
            residency.fetch(found, placed, more.to(device), fewer, held)
            more = torch.where(more < stored, more, EMPTY)
            own = place_reference(expected, more, is_prefetch=True)
            fetch_reference(expected, own, more, paired)
            assert torch.equal(placed[0].cpu(), own)
        for mine, other in zip(found.tensors[1:], expected.tensors[1:], strict=True):
            assert torch.equal(mine.cpu(), other)
        assert torch.equal(words(found.rows.cpu()), words(expected.rows))


def check_nothing_is_fetched(hot: HotSet, lists: Tensor, paired: Tensor) -> None:
    """Where none is to be placed, all is as it was, and what a placement has left is not read."""
    from fierpatch.kernels import residency

    before = [tensor.clone() for tensor in hot.tensors]
    length = torch.zeros(1, dtype=torch.int64, device=lists.device)
    placed = residency.place(hot, lists, length)
    residency.fetch(hot, placed, lists, length, paired)
    for mine, other in zip(hot.tensors, before, strict=True):
        assert torch.equal(words(mine.cpu()), words(other.cpu()))


def check_lengths_ahead(num_lists: int, width: int, extra: int, device: torch.device) -> None:
    """All that is stored from the least on that it pays from, else nothing."""
    from fierpatch.kernels import append, residency

    hot = HotSet.empty(width, 9, 1, num_lists, 4, torch.zeros(1, device=device))
    needed = max(hot.least_needed(width) + extra, 0)
    hot.tally[..., NEEDED] = needed // num_lists
    hot.tally[:, 0, NEEDED] += needed % num_lists
    counters = append.new_counters(device)
    for stored in (0, 1, 77):
        counters[0] = stored
        end = stored if extra >= 0 else 0
        for shortest in (0, 1):
            room = counters.new_empty(4)
            lengths = residency.lengths_ahead(hot, width, counters, room, shortest=shortest)
            assert [length.tolist() for length in lengths] == [[max(end, shortest)], [end]]


def hide_hits(paired: Tensor, lists: Tensor, places: Tensor) -> Tensor:
    """The rows with NaN in those that no list has to fetch: who reads them there is found out."""
    hidden = paired.clone()
    lists_per_head = lists.shape[1] // paired.shape[2]
    for b in range(lists.shape[0]):
        for head in range(paired.shape[2]):
            own = slice(head * lists_per_head, (head + 1) * lists_per_head)
            tokens, lies = lists[b, own], places[b, own]
            fetched = set(tokens[lies >= MISSING].tolist())
            held = set(tokens[(lies >= 0) & (lies < MISSING)].tolist()) - fetched
            hidden[sorted(held), b, head] = torch.nan
    return hidden


def check_an_empty_row_goes_first(device: torch.device) -> None:
    """Before that of a token which was selected so long ago that its age has stopped to count."""
    from fierpatch.kernels import residency

    hot = HotSet.empty(3, 9, 1, 1, 4, torch.zeros(1, device=device))
    paired, length = torch.zeros(9, 1, 1, 4, device=device), torch.tensor([9], device=device)
    for token in (0, *[1] * 70, 2):
        lists = torch.tensor([[[[token]]]], device=device)
        residency.fetch(hot, residency.place(hot, lists), lists, length, paired)
    assert hot.tokens.tolist() == [[[0, 1, 2]]]


def check_break_off(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that is not launched after a placement leaves an empty set."""
    from fierpatch.kernels import attention

    hot = HotSet.empty(3, 9, 1, 1, 128, torch.zeros(1, device=device))
    keys, values = split([torch.randn(9, 1, 1, 128, device=device)], 64)
    query = torch.randn(1, 1, 1, 64, device=device)

    def attend(*tokens: int) -> Tensor:
        lists = torch.tensor([[[tokens]]], device=device)
        return attention.gather_attention(query, keys, values, lists, scale=1.0, hot=hot)

    attend(0, 1)
    before = attend(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend_specialization", lambda *_: Interrupting())
        with pytest.raises(KeyboardInterrupt):
            attend(3, 4)
    for tensor in (hot.tokens, hot.row_of):
        assert (tensor == EMPTY).all()
    assert torch.equal(attend(1, 2), before)


class Interrupting:
    """A kernel whose launch is interrupted."""

    def launch(self, *arguments: object) -> None:
        raise KeyboardInterrupt


def check_behind_the_end(device: torch.device) -> None:
    """A token that there is no room for touches neither its own list nor the next."""
    from fierpatch.kernels import attention

    hot = HotSet.empty(3, 9, 1, 2, 128, torch.zeros(1, device=device))
    keys, values = split([torch.randn(9, 1, 2, 128, device=device)], 64)
    query = torch.randn(1, 2, 1, 64, device=device)
    lists = torch.tensor([[[[9, 4]], [[2, 12]]]], device=device)
    attention.gather_attention(query, keys, values, lists, scale=1.0, hot=hot)
    found = [[row for row in rows if row != EMPTY] for rows in hot.tokens[0].tolist()]
    assert found == [[4], [2]]
    assert [(rows != EMPTY).nonzero().flatten().tolist() for rows in hot.row_of[0]] == [[4], [2]]
