"""The residency policy, in plain Python and in tensors, keeps what was selected last."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fierpatch.errors import ConfigError
from fierpatch.hot_set import (
    ASKED,
    CLOCK,
    EMPTY,
    MISSED,
    MISSING,
    NEEDED,
    NUM_COUNTS,
    PREFETCHED,
    USED,
    USEFUL,
    HotSet,
    fetch,
    place,
)  # fmt: skip
from fierpatch.offload.residency import Placement, Residency

NUM_TOKENS = 12


class ResidencyMachine(RuleBasedStateMachine):
    """Beside the policy a plain history, which says when each token was selected last."""

    @initialize(num_rows=st.integers(1, 6))
    def make(self, num_rows: int) -> None:
        self.residency = Residency(num_rows)
        self.history: dict[int, float] = {}
        self.held: dict[int, int] = {}  # row by token
        self.step = 0

    def check(self, placement: Placement, chosen: list[int], time: float, room: int) -> None:
        """`room` rows at most may change hands."""
        stayed = {token: row for token, row in self.held.items() if token in chosen}
        missing = [token for token in chosen if token not in stayed]
        fetched = missing[:room]
        assert [token for _, token in placement.misses] == fetched
        placed = {t: r for t, r in zip(chosen, placement.rows, strict=False) if r != EMPTY}
        assert placed.keys() == {*stayed, *fetched}
        assert len(set(placed.values())) == len(placed)
        assert all(placed[token] == row for token, row in stayed.items())
        assert all(placed[token] == row for row, token in placement.misses)
        after = {token: row for row, token in enumerate(self.residency.tokens) if token != EMPTY}
        gone = self.held.keys() - after.keys()
        kept = after.keys() - {*chosen}
        # None leaves while a row is empty, none that was selected later than one that stays.
        rows = len(self.residency.tokens)
        assert len(after) == min(rows, len(self.held.keys() | {*fetched}))
        for token in gone:
            for other in kept:
                mine = (self.history[token], self.held[token])
                assert mine < (self.history[other], self.held[other])
        for token in placed:
            self.history[token] = max(time, self.history.get(token, 0) if token in stayed else 0)
        self.held = after

    @rule(data=st.data(), unused=st.integers(0, 2))
    def place(self, data: st.DataObject, unused: int) -> None:
        rows = len(self.residency.tokens)
        chosen = sorted(data.draw(st.sets(st.integers(0, 9), max_size=rows)))
        placement = self.residency.place([*chosen, *[EMPTY] * unused])
        self.step += 1
        assert placement.rows[len(chosen) :] == (EMPTY,) * unused
        self.check(placement, chosen, self.step, rows)

    @rule(candidates=st.lists(st.integers(0, 9), unique=True, max_size=8))
    def prefetch(self, candidates: list[int]) -> None:
        placement = self.residency.prefetch(candidates)
        time = self.step - 0.5
        busy = [t for t in self.held if t in candidates or self.history[t] >= time]
        room = len(self.residency.tokens) - len(busy)
        self.check(placement, candidates, time, room)

    @rule(length=st.integers(0, 10))
    def crop(self, length: int) -> None:
        self.residency.crop(length)
        self.held = {token: row for token, row in self.held.items() if token < length}

    @rule(data=st.data())
    def refuse_more_tokens_than_rows(self, data: st.DataObject) -> None:
        rows = len(self.residency.tokens)
        before = list(self.residency.tokens)
        with pytest.raises(ConfigError, match=f"{rows + 1} tokens do not fit {rows} rows"):
            self.residency.place(range(rows + 1))
        assert self.residency.tokens == before

    @invariant()
    def rows_hold_what_was_placed(self) -> None:
        if hasattr(self, "residency"):
            found = enumerate(self.residency.tokens)
            assert {token: row for row, token in found if token != EMPTY} == self.held


class HotSetMachine(RuleBasedStateMachine):
    """The tensors of several lists beside a policy for each; rows hold what the host has."""

    @initialize(
        num_rows=st.integers(1, 6),
        batch_size=st.integers(1, 2),
        num_heads=st.integers(1, 2),
        lists_per_head=st.integers(1, 2),
    )
    def make(self, num_rows: int, batch_size: int, num_heads: int, lists_per_head: int) -> None:
        self.paired = torch.randn(NUM_TOKENS, batch_size, num_heads, 3)
        num_lists = num_heads * lists_per_head
        self.hot = HotSet.empty(num_rows, NUM_TOKENS, batch_size, num_lists, 3, self.paired)
        self.models = [[Residency(num_rows) for _ in range(num_lists)] for _ in range(batch_size)]
        self.sums = torch.zeros(batch_size, num_lists, NUM_COUNTS, dtype=torch.int64)

    def rows_of(self, lists: list[list[list[int]]], *, is_prefetch: bool) -> None:
        token_indices = torch.tensor(lists)[:, :, None]
        places = place(self.hot, token_indices, is_prefetch=is_prefetch)
        rows = fetch(self.hot, places, token_indices, self.paired)
        for b, models in enumerate(self.models):
            for number, model in enumerate(models):
                chosen = lists[b][number]
                useful = model.num_useful
                expected = model.prefetch(chosen) if is_prefetch else model.place(chosen)
                assert tuple(rows[b, number, 0].tolist()) == expected.rows
                missing = places[b, number, 0] >= MISSING
                fetched = {t for t, gone in zip(chosen, missing, strict=True) if gone}
                assert fetched == {token for _, token in expected.misses}
                self.sums[b, number, PREFETCHED if is_prefetch else MISSED] += len(fetched)
                used = len(chosen) - chosen.count(EMPTY)
                self.sums[b, number, ASKED if is_prefetch else USED] += used
                self.sums[b, number, CLOCK] = model.step
                self.sums[b, number, USEFUL] = model.num_useful
                if not is_prefetch:
                    self.sums[b, number, NEEDED] = len(fetched) + model.num_useful - useful

    def draw_lists(self, data: st.DataObject, width: int) -> list[list[list[int]]]:
        """Lists of tokens and unused slots in any order."""
        one = st.permutations([*range(NUM_TOKENS), *[EMPTY] * width]).map(lambda x: x[:width])
        return [[data.draw(one) for _ in models] for models in self.models]

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        width = data.draw(st.integers(1, self.hot.tokens.shape[2]))
        self.rows_of(self.draw_lists(data, width), is_prefetch=False)

    @rule(data=st.data(), width=st.integers(1, 8))
    def prefetch(self, data: st.DataObject, width: int) -> None:
        self.rows_of(self.draw_lists(data, width), is_prefetch=True)

    @rule(length=st.integers(0, NUM_TOKENS))
    def crop(self, length: int) -> None:
        self.hot.forget(length)
        for models in self.models:
            for model in models:
                model.crop(length)
        self.paired[length:] = torch.randn(self.paired[length:].shape)

    @invariant()
    def state_is_the_models(self) -> None:
        if not hasattr(self, "models"):
            return
        tokens = [[model.tokens for model in models] for models in self.models]
        assert self.hot.tokens.tolist() == tokens
        assert torch.equal(self.hot.tally, self.sums)
        for b, models in enumerate(self.models):
            for number, model in enumerate(models):
                row_of = [EMPTY] * NUM_TOKENS
                for row, token in enumerate(model.tokens):
                    if token != EMPTY:
                        row_of[token] = row
                        head = number * self.paired.shape[2] // len(models)
                        held = self.hot.rows[b, number, row]
                        assert torch.equal(held, self.paired[token, b, head])
                assert self.hot.row_of[b, number].tolist() == row_of


TestResidency = ResidencyMachine.TestCase
TestHotSet = HotSetMachine.TestCase


def test_empty_rows_go_first_and_the_lowest_of_equals_leaves_first() -> None:
    residency = Residency(4)
    assert residency.place([5, 7]).misses == ((0, 5), (1, 7))
    assert residency.place([7, 9, EMPTY]) == Placement((1, 2, EMPTY), ((2, 9),))
    residency.place([1, 2])  # one empty row, then 5, selected longest ago
    assert residency.tokens == [1, 7, 9, 2]
    residency.place([3])  # 7 and 9 were selected last in the same step
    assert residency.tokens == [1, 3, 9, 2]


def test_ages_from_63_steps_on_are_equal() -> None:
    for num_steps, leaves in ((61, 1), (62, 0)):
        residency = Residency(3)
        residency.place([5, 6])
        residency.place([5])  # so 6, in row 1, is the older one
        for _ in range(num_steps):
            residency.place([7])
        residency.place([8])
        assert residency.tokens[leaves] == 8


def test_no_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_rows=0"):
        Residency(0)
