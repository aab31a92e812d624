"""Which blocks of keys each block of a prompt's queries attends.

Blocks of queries are counted from the first query on, blocks of keys from the first token on. All
of it is plain PyTorch of fixed shapes, without a sync: the specification, and what runs on a GPU
but for `sampled_masses`, which has a kernel there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fierpatch.reference import exact_scores
from fierpatch.select import to_logits

QUERY_BLOCK = 128  # the tile of queries of FlexAttention's kernel on an H100
KEY_BLOCK = 64  # a lower density than 128 at equal mass, and as fast: see bench/NOTES.md
SAMPLES = 8  # queries that speak for their block, evenly spaced


@dataclass(frozen=True)
class Span:
    """Blocks ``first .. last`` of the queries of a prompt, whose queries end a context.

    Args:
        num_queries: T, of the whole prompt.
        length: S, tokens stored, those of the prompt included.
        first, last: blocks of queries.
        device: where tensors of positions are made.
    """

    num_queries: int
    length: int
    first: int
    last: int
    device: torch.device

    @property
    def num_blocks(self) -> int:
        """Blocks of queries."""
        return self.last - self.first

    @property
    def num_key_blocks(self) -> int:
        """Blocks of keys of the whole context, the last of which may not be whole."""
        return -(-self.length // KEY_BLOCK)

    @property
    def rows(self) -> slice:
        """The span's queries among those of the prompt."""
        return slice(self.first * QUERY_BLOCK, min(self.last * QUERY_BLOCK, self.num_queries))

    @property
    def stored(self) -> int:
        """Tokens before the prompt."""
        return self.length - self.num_queries

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The first and the last position of each block of queries, int64 ``[blocks]``."""
        block = torch.arange(self.first, self.last, device=self.device)
        low = self.stored + block * QUERY_BLOCK
        return low, (low + QUERY_BLOCK - 1).clamp_max(self.length - 1)

    @property
    def samples(self) -> Tensor:
        """The rows of the queries that speak for each block, int64 ``[blocks * SAMPLES]``.

        Each from the middle of its part of the block. Behind the last query it is the last.
        """
        step = QUERY_BLOCK // SAMPLES
        rows = torch.arange(
            self.first * QUERY_BLOCK + step // 2, self.last * QUERY_BLOCK, step, device=self.device
        )
        return rows.clamp_max(self.num_queries - 1)


def rows_visible(visible: Tensor, rows: Tensor | slice) -> Tensor:
    """Some rows of a mask ``[B, 1, T, S]``, or its only one, for padding: ``[B, 1, 1, S]``."""
    return visible if visible.shape[2] == 1 else visible[:, :, rows]


def sampled_masses(
    query: Tensor,
    estimates: Tensor,
    span: Span,
    *,
    scale: float,
    softcap: float = 0.0,
    visible: Tensor | None = None,
) -> Tensor:
    """The logarithm of what each sampled query's weights, before they sum to 1, add up to.

    Args:
        query: ``[B, Hq, T, D]``, of the whole prompt.
        estimates: ``[B, H, S, D]``, what stands for the keys.
        span: the blocks of queries.
        scale, softcap: as in `fierpatch.select.to_logits`.
        visible: bool ``[B, 1, T or 1, S]``, beside causality; None means every token.

    Returns:
        float32 ``[B, Hq, blocks * SAMPLES, key blocks]``, -inf where nothing is visible.
    """
    samples = span.samples
    logits = to_logits(exact_scores(query[:, :, samples], estimates), scale, softcap)
    token = torch.arange(span.length, device=span.device)
    logits = logits.masked_fill(token > span.stored + samples[:, None], -torch.inf)
    if visible is not None:
        logits = logits.masked_fill(~rows_visible(visible, samples), -torch.inf)
    blocks = pad(logits, (0, -span.length % KEY_BLOCK), value=-torch.inf)
    return blocks.unflatten(3, (-1, KEY_BLOCK)).logsumexp(4)


def pooled_shares(log_masses: Tensor) -> Tensor:
    """The mean over the sampled queries of a block of the share that each key block has of them.

    Args:
        log_masses: from `sampled_masses`.

    Returns:
        float32 ``[B, Hq, blocks, key blocks]``; rows sum to 1, or to less where a sampled query
        sees nothing.
    """
    shares = log_masses.softmax(3).unflatten(2, (-1, SAMPLES))
    return shares.nansum(3) / SAMPLES  # a query that sees nothing has no softmax


def candidate_blocks(span: Span, visible: Tensor | None = None) -> Tensor:
    """Key blocks with a token that some query of the block sees.

    Args:
        span: the blocks of queries.
        visible: as in `sampled_masses`.

    Returns:
        bool ``[B or 1, 1, blocks, key blocks]``.
    """
    _, high = span.bounds
    if visible is None:
        start = torch.arange(span.num_key_blocks, device=span.device) * KEY_BLOCK
        return (start <= high[:, None])[None, None]
    seen = visible
    if visible.shape[2] > 1:
        rows = visible[:, :, span.rows]
        rows = pad(rows, (0, 0, 0, span.num_blocks * QUERY_BLOCK - rows.shape[2]))
        seen = rows.unflatten(2, (span.num_blocks, QUERY_BLOCK)).any(3)
    token = torch.arange(span.length, device=span.device)
    return _any_of_block(seen & (token <= high[:, None]))


def whole_blocks(span: Span, visible: Tensor | None = None) -> Tensor:
    """Key blocks of which every query of the block sees every token, shaped as candidates are."""
    low, _ = span.bounds
    end = (torch.arange(span.num_key_blocks, device=span.device) + 1) * KEY_BLOCK
    whole = (end <= low[:, None] + 1)[None, None]
    if visible is None:
        return whole
    if visible.shape[2] > 1:
        return torch.zeros_like(whole)  # compared token by token
    return whole & ~_any_of_block(~visible)


def kept_blocks(span: Span, *, sinks: int, recent: int, visible: Tensor | None = None) -> Tensor:
    """Key blocks that hold a sink, or one of the last `recent` tokens of a query of the block.

    Sinks are the first tokens that the last query sees, so padding is never one.

    Args:
        span: the blocks of queries.
        sinks, recent: tokens, see `FierConfig`.
        visible: as in `sampled_masses`.

    Returns:
        bool ``[B or 1, 1, blocks, key blocks]``.
    """
    low, high = span.bounds
    start = torch.arange(span.num_key_blocks, device=span.device) * KEY_BLOCK
    band = (start <= high[:, None]) & (start + KEY_BLOCK > low[:, None] - recent + 1)
    if visible is None:
        return (band | (start < sinks))[None, None]
    last = visible[:, :, -1:]
    is_sink = last & (last.cumsum(3) <= sinks)
    return _any_of_block(is_sink) | band[None, None]


def choose_blocks(
    shares: Tensor, candidates: Tensor, kept: Tensor, *, mass: float, minimum: int
) -> Tensor:
    """The fewest key blocks of each row that hold the mass: those kept, then by their share.

    Args:
        shares: ``[B, Hq, blocks, key blocks]``, from `pooled_shares`.
        candidates, kept: bool, broadcastable to that; nothing but candidates is chosen.
        mass: the part of all shares of a row that has to be held, in 0 .. 1; 1 means every
            candidate, however little it is thought to weigh.
        minimum: key blocks chosen at least, where there are as many candidates.

    Returns:
        bool, shaped as `shares`; equal shares go to the lowest block.
    """
    candidates = candidates.expand_as(shares)
    if mass >= 1:
        return candidates
    kept = kept & candidates
    priority = shares.masked_fill(kept, torch.inf).masked_fill(~candidates, -torch.inf)
    order = priority.argsort(dim=-1, descending=True, stable=True)
    held = shares.gather(-1, order).cumsum(-1)
    before = pad(held[..., :-1], (1, 0))
    rank = torch.arange(shares.shape[3], device=shares.device)
    is_chosen = (before < mass * held[..., -1:]) | (rank < minimum)
    chosen = torch.zeros_like(kept).scatter(-1, order, is_chosen)
    return (chosen | kept) & candidates


def _any_of_block(is_token: Tensor) -> Tensor:
    """Bool ``[..., S]`` to ``[..., key blocks]``: whether any token of the block is one."""
    padded = pad(is_token, (0, -is_token.shape[-1] % KEY_BLOCK))
    return padded.unflatten(-1, (-1, KEY_BLOCK)).any(-1)
