"""The rows of all KV heads at once on a device that has room for a few: which tokens lie there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -1
_NEVER = -(1 << 30)


@dataclass
class Fetched:
    """What one `HotSet.put` met, bool or int64 ``[N, K]`` each, by the order of its tokens."""

    is_hit: Tensor
    is_fetched: Tensor
    ahead_at: Tensor
    """When the token of a hit was fetched ahead, if nobody has wanted it since; else EMPTY."""
    num_wasted: int
    """Rows fetched ahead that left with nobody having wanted them."""


class HotSet:
    """The tokens that lie on the device, of N KV heads; the row of the lowest stamp leaves first.

    Of equal stamps the lowest row leaves first, and empty rows are taken before any leaves.

    Args:
        num_heads: N.
        num_rows: R, of each head.
        num_tokens: S, the length that the context will have in the end.
    """

    def __init__(self, num_heads: int, num_rows: int, num_tokens: int) -> None:
        self.num_rows = num_rows
        # One row and one token more than there are take what is not to be written anywhere.
        self._tokens = torch.full((num_heads, num_rows + 1), EMPTY)
        self._stamps = torch.full((num_heads, num_rows + 1), _NEVER)
        self._ahead_at = torch.full((num_heads, num_rows + 1), EMPTY)
        self._row_of = torch.full((num_heads, num_tokens + 1), EMPTY)

    def holds(self, tokens: Tensor) -> Tensor:
        """Which of ``tokens [N, K]`` lie in a row: bool of that shape."""
        return self._row_of.gather(1, tokens) != EMPTY

    def stamp(self, tokens: Tensor, stamps: Tensor) -> None:
        """Give the rows of some tokens, all of which lie in one, the stamps ``[N, K]``."""
        self._stamps.scatter_(1, self._row_of.gather(1, tokens), stamps)

    def put(
        self, tokens: Tensor, stamp: int, *, is_fetching: bool = True, ahead_at: int = EMPTY
    ) -> Fetched:
        """Stamp the rows of some tokens, and fetch the others in order while lower stamps leave.

        Args:
            tokens: ``[N, K]``, each once.
            stamp: of their rows from now on, where it is not higher already.
            is_fetching: whether those that lie nowhere are fetched.
            ahead_at: for tokens that nobody has wanted yet, the step at which they are fetched.
        """
        nowhere = self.num_rows
        rows = self._row_of.gather(1, tokens)
        is_hit = rows != EMPTY
        rows = torch.where(is_hit, rows, nowhere)
        was_ahead = self._ahead_at.gather(1, rows)
        self._stamps.scatter_(1, rows, self._stamps.gather(1, rows).clamp_min(stamp))
        if ahead_at == EMPTY:
            self._ahead_at.scatter_(1, rows, EMPTY)
        stamps = self._stamps[:, :nowhere]
        order = stamps.argsort(dim=1, stable=True)
        num_leaving = (stamps < stamp).sum(1, keepdim=True)
        rank = (~is_hit).cumsum(1) - 1
        is_fetched = ~is_hit & (rank < num_leaving) if is_fetching else torch.zeros_like(is_hit)
        rows = order.gather(1, rank.clamp(0, nowhere - 1))
        rows = torch.where(is_fetched, rows, nowhere)
        gone = self._tokens.gather(1, rows)
        num_wasted = int((is_fetched & (self._ahead_at.gather(1, rows) != EMPTY)).sum())
        last = self._row_of.shape[1] - 1
        self._row_of.scatter_(1, torch.where(gone == EMPTY, last, gone), EMPTY)
        self._row_of.scatter_(1, torch.where(is_fetched, tokens, last), rows)
        self._tokens.scatter_(1, rows, tokens)
        self._stamps.scatter_(1, rows, stamp)
        self._ahead_at.scatter_(1, rows, ahead_at)
        for table, nothing in (
            (self._tokens, EMPTY), (self._stamps, _NEVER), (self._ahead_at, EMPTY)
        ):  # fmt: skip
            table[:, nowhere] = nothing
        self._row_of[:, last] = EMPTY
        return Fetched(is_hit, is_fetched, was_ahead, num_wasted)
