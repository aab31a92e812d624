"""The hot set: rows of the tokens that a list selected last, kept on the device beside the host.

A list selects much of what it selected the step before, so most of its rows need no fetching. The
policy is `fierpatch.offload.residency.Residency`, in tensors and for all lists of a layer at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

EMPTY = -1
MISSING = 1 << 30  # added to the row of a token that is not there yet
OLDEST = 126  # ages from here on are one, and an empty row is older still
CLOCK, USED, MISSED, PREFETCHED, ASKED, USEFUL, NEEDED = range(7)  # columns of a tally
NUM_COUNTS = 7

# The share of a step's tokens that had to be fetched, then or ahead, from which on it pays to fetch
# ahead in the next one: on an H100, over 128K tokens, a step without takes 9.0 ms and 4.7 more for
# all of its tokens, and one that fetches ahead 10.2 and 0.3 more (`bench offload`).
PAYS_FROM = 0.3


@dataclass(frozen=True)
class HotSet:
    """The state of a layer; L lists are KV heads, or query heads where each selects its own.

    Attributes:
        rows: ``[B, L, R, D + Dv]``, key and value side by side.
        tokens: int32 ``[B, L, R]``, the token of each row; EMPTY for none.
        stamps: int32 ``[B, L, R]``, ``2 step + 1`` where the token was last selected in that step,
            ``2 step`` where it was prefetched after it, and 0 for an empty row.
        row_of: int16 or int32 ``[B, L, C]``, the row of each token; EMPTY where it has none.
        tally: int64 ``[B, L, 7]``: steps so far, tokens selected, of these fetched; tokens
            prefetched, tokens that prefetches asked for, these and those that were there already,
            and tokens selected that were asked for since they were selected last. Then of the last
            step alone: tokens fetched, and those asked for since they were selected last.
    """

    rows: Tensor
    tokens: Tensor
    stamps: Tensor
    row_of: Tensor
    tally: Tensor

    @classmethod
    def empty(
        cls, num_rows: int, capacity: int, batch_size: int, num_lists: int, width: int, like: Tensor
    ) -> HotSet:
        """A set without tokens.

        Args:
            num_rows: R, at least as many as a list is long.
            capacity: C, tokens that there may be.
            width: ``D + Dv``.
            like: gives dtype and device of the rows.
        """
        lead = (batch_size, num_lists)
        wide = torch.int16 if num_rows <= torch.iinfo(torch.int16).max else torch.int32
        new = like.new_full
        return cls(
            rows=like.new_zeros((*lead, num_rows, width)),
            tokens=new((*lead, num_rows), EMPTY, dtype=torch.int32),
            stamps=new((*lead, num_rows), 0, dtype=torch.int32),
            row_of=new((*lead, capacity), EMPTY, dtype=wide),
            tally=new((*lead, NUM_COUNTS), 0, dtype=torch.int64),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, as the library ops take them."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def forget(self, length: int) -> None:
        """Forget tokens from `length` on."""
        is_gone = self.tokens >= length
        self.tokens.masked_fill_(is_gone, EMPTY)
        self.stamps.masked_fill_(is_gone, 0)
        self.row_of[..., length:] = EMPTY

    def clear(self) -> None:
        """Forget everything, the tally too."""
        self.forget(0)
        self.tally.zero_()

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> HotSet:
        """With `change` made to every tensor, which all lead with the batch."""
        return HotSet(*map(change, self.tensors))

    def least_needed(self, width: int) -> int:
        """Tokens of a step, of all lists of so many, that it pays from to fetch ahead."""
        return math.ceil(PAYS_FROM * self.tally.shape[:2].numel() * width)

    def resize(self, capacity: int) -> HotSet:
        """The same with room for more tokens."""
        row_of = self.row_of.new_full((*self.row_of.shape[:2], capacity), EMPTY)
        row_of[..., : self.row_of.shape[2]] = self.row_of
        return HotSet(self.rows, self.tokens, self.stamps, row_of, self.tally)


def place(hot: HotSet, token_indices: Tensor, *, is_prefetch: bool = False) -> Tensor:
    """Make room for the tokens of one step's lists, and say where they lie.

    The least recently selected tokens leave first, of equals the one in the lowest row, and empty
    rows are taken before any leaves. What is missing takes the rows that became free in their
    order. The rows themselves are for the caller to fetch.

    Args:
        token_indices: integers ``[B, L, 1, K]``, distinct in a list; EMPTY marks an unused slot.
        is_prefetch: the tokens may be wanted in the next step; they make none that this step
            selected leave, and where there is no room for one it is left out.

    Returns:
        int32 ``[B, L, 1, K]``: the row of each token, and MISSING more where it is not there yet;
        EMPTY for an unused slot, or a token left out.
    """
    chosen = token_indices[:, :, 0].long()
    is_used = chosen >= 0
    row = hot.row_of.gather(2, chosen.clamp_min(0)).long().masked_fill(~is_used, EMPTY)
    is_hit = row >= 0
    clock = hot.tally[..., CLOCK, None] + (not is_prefetch)
    now = 2 * clock + (not is_prefetch)
    at = is_hit.nonzero(as_tuple=True)
    found = (*at[:2], row[at])
    before = hot.stamps[found]
    hot.stamps[found] = torch.maximum(before, now.expand_as(row)[at].int())

    age = (now - hot.stamps).clamp(0, OLDEST)
    age = torch.where(hot.tokens == EMPTY, OLDEST + 1, age)
    is_missing = is_used & ~is_hit
    if is_prefetch:
        is_missing &= is_missing.cumsum(-1) <= (age > 0).sum(-1, keepdim=True)
    num_missing = is_missing.sum(-1, keepdim=True)
    order = age.argsort(dim=-1, descending=True, stable=True)
    num_rows = hot.tokens.shape[2]
    leaves = torch.arange(num_rows, device=row.device).expand_as(order) < num_missing
    is_free = torch.zeros_like(leaves).scatter(-1, order, leaves)
    # The n-th that is missing takes the n-th free row.
    slot = torch.where(is_free, is_free.cumsum(-1) - 1, num_rows)
    freed = slot.new_zeros((*slot.shape[:2], num_rows + 1))
    numbers = torch.arange(num_rows, device=row.device).expand_as(slot)
    freed.scatter_(-1, slot, numbers)
    rank = (is_missing.cumsum(-1) - 1).clamp_min(0)
    row = torch.where(is_missing, freed.gather(-1, rank), row)

    b, list_, k = is_missing.nonzero(as_tuple=True)
    new, token = row[b, list_, k], chosen[b, list_, k]
    old = hot.tokens[b, list_, new]
    was_there = old != EMPTY
    hot.row_of[b[was_there], list_[was_there], old[was_there].long()] = EMPTY
    hot.row_of[b, list_, token] = new.to(hot.row_of.dtype)
    hot.tokens[b, list_, new] = token.int()
    hot.stamps[b, list_, new] = now.expand_as(row)[b, list_, k].int()
    if is_prefetch:
        hot.tally[..., PREFETCHED] += num_missing[..., 0]
        hot.tally[..., ASKED] += is_used.sum(-1)
    else:
        hot.tally[..., CLOCK] += 1
        hot.tally[..., USED] += is_used.sum(-1)
        hot.tally[..., MISSED] += num_missing[..., 0]
        is_useful = torch.zeros_like(is_hit)
        is_useful[at] = before % 2 == 0
        hot.tally[..., USEFUL] += is_useful.sum(-1)
        hot.tally[..., NEEDED] = num_missing[..., 0] + is_useful.sum(-1)
    return torch.where(is_missing, row + MISSING, row).int()[:, :, None]


def fetch(hot: HotSet, places: Tensor, token_indices: Tensor, paired: Tensor) -> Tensor:
    """Copy what `place` marked as missing out of paired rows ``[C, B, H, D + Dv]``.

    Returns:
        int64 like `places`: the row of each token, EMPTY for an unused slot.
    """
    b, list_, t, k = (places >= MISSING).nonzero(as_tuple=True)
    rows = places.long() % MISSING
    head = list_ // (places.shape[1] // paired.shape[2])
    token = token_indices[b, list_, t, k]
    hot.rows[b, list_, rows[b, list_, t, k]] = paired[token, b, head]
    return rows.masked_fill(places == EMPTY, EMPTY)
