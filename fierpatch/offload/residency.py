"""Which tokens lie in the few rows that the device has for them: the policy, in plain Python.

`fierpatch.hot_set` and the kernel do the same for all lists of a layer at once, and are held to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fierpatch.errors import ConfigError
from fierpatch.hot_set import EMPTY, OLDEST


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one list lie.

    Args:
        rows: of each token, EMPTY for an unused slot or a token left out.
        misses: pairs of row and token to fetch, in the list's order.
    """

    rows: tuple[int, ...]
    misses: tuple[tuple[int, int], ...]


class Residency:
    """The rows of one list: the least recently selected token leaves first.

    Rows of the current selection stay. A token that was prefetched after a step is older than
    those selected in it. Of tokens equally old the one in the lowest row leaves first, and empty
    rows are taken before any leaves. Ages from 63 steps on count as equal, so that the kernel sorts
    by counting. What is missing takes the rows that became free in their order.

    Args:
        num_rows: as many as the longest list, or more.

    Raises:
        ConfigError: there are no rows.
    """

    def __init__(self, num_rows: int) -> None:
        if num_rows < 1:
            raise ConfigError(f"num_rows={num_rows} holds no token: give as many as the budget")
        self.tokens = [EMPTY] * num_rows
        self.step = 0
        self.num_useful = 0
        self._stamps = [0] * num_rows
        self._row_of: dict[int, int] = {}

    def place(self, chosen: Sequence[int]) -> Placement:
        """Make room for the tokens of a step's list, each once; EMPTY marks an unused slot.

        Raises:
            ConfigError: the list is longer than there are rows; nothing has changed.
        """
        wanted = [token for token in chosen if token != EMPTY]
        if len(wanted) > len(self.tokens):
            raise ConfigError(
                f"{len(wanted)} tokens do not fit {len(self.tokens)} rows: give as many rows as "
                "the budget, or lower the budget"
            )
        self.step += 1
        hits = [self._row_of[token] for token in wanted if token in self._row_of]
        self.num_useful += sum(self._stamps[row] % 2 == 0 for row in hits)
        return self._place(chosen, 2 * self.step + 1)

    def prefetch(self, candidates: Sequence[int]) -> Placement:
        """Make room for tokens that the next step may select, as far as this step's leave any."""
        return self._place(candidates, 2 * self.step)

    def crop(self, length: int) -> None:
        """Forget tokens from `length` on."""
        for token in [token for token in self._row_of if token >= length]:
            row = self._row_of.pop(token)
            self.tokens[row], self._stamps[row] = EMPTY, 0

    def _place(self, chosen: Sequence[int], now: int) -> Placement:
        for token in chosen:
            if token in self._row_of:
                row = self._row_of[token]
                self._stamps[row] = max(self._stamps[row], now)
        missing = [token for token in chosen if token != EMPTY and token not in self._row_of]
        leaving = sorted(
            (-self._age(row, now), row)
            for row, stamp in enumerate(self._stamps)
            if stamp < now or self.tokens[row] == EMPTY
        )
        freed = sorted(row for _, row in leaving[: len(missing)])
        misses = tuple(zip(freed, missing, strict=False))
        for row, token in misses:
            self._row_of.pop(self.tokens[row], None)
            self.tokens[row], self._stamps[row] = token, now
            self._row_of[token] = row
        rows = tuple(self._row_of.get(token, EMPTY) for token in chosen)
        return Placement(rows, misses)

    def _age(self, row: int, now: int) -> int:
        if self.tokens[row] == EMPTY:
            return OLDEST + 1
        return min(now - self._stamps[row], OLDEST)
