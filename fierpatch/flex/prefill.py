"""Sparse prefill: a prompt attends the blocks of keys that hold most of its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fierpatch.flex.blocks import (
    KEY_BLOCK,
    QUERY_BLOCK,
    SAMPLES,
    Span,
    candidate_blocks,
    choose_blocks,
    kept_blocks,
    pooled_shares,
    rows_visible,
    sampled_masses,
)
from fierpatch.index import KeyIndex
from fierpatch.index.packing import TILE_SIZE, num_tiles
from fierpatch.reference import masked_attention

_ELEMENTS_AT_ONCE = 1 << 26  # of the largest temporary: 256 MiB of float32
_TILES_AT_ONCE = 16  # of the index, turned back into keys together


@dataclass(frozen=True)
class PrefillSettings:
    """How many blocks are chosen; the fields are those of `FierConfig`.

    Args:
        mass: the part of the estimated weight that every block of queries has to hold.
        minimum: tokens that it attends at least.
        sinks, recent: tokens that are always attended.
    """

    mass: float
    minimum: int
    sinks: int
    recent: int


BlockObserver = Callable[[Span, Tensor], None]
"""Sees which key blocks were chosen for a span: bool ``[B, Hq, blocks, key blocks]``."""


def sparse_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    estimates: Tensor,
    settings: PrefillSettings,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    visible: Tensor | None = None,
    observer: BlockObserver | None = None,
) -> Tensor:
    """Causal attention of the newest tokens over the key blocks chosen for them.

    Spans of query blocks, one after the other: choose by `estimates`, then attend. So that no
    temporary has more than 2^26 elements, a span is as long as that allows; one block of queries is
    the least, whose sampled scores are ``8 B Hq S`` elements.

    Args:
        query: ``[B, Hq, T, D]``, the newest T of S tokens.
        keys, values: ``[B, H, S, D]``, ``[B, H, S, Dv]``.
        estimates: ``[B, H, S, D]``, what stands for the keys when blocks are chosen.
        settings: how many are chosen.
        scale, softcap, sink_logits: as in `fierpatch.select.attention_weights`.
        visible: bool ``[B, 1, T or 1, S]``, beside causality; None means every token.
        observer: is told of each span's choice.

    Returns:
        ``[B, T, Hq, Dv]`` in the query's dtype; 0 for a query that sees nothing.
    """
    batch_size, num_query_heads, num_queries, _ = query.shape
    length = keys.shape[2]
    output = query.new_empty((batch_size, num_queries, num_query_heads, values.shape[3]))
    num_blocks = -(-num_queries // QUERY_BLOCK)
    at_once = max(_ELEMENTS_AT_ONCE // (batch_size * num_query_heads * SAMPLES * length), 1)
    for first in range(0, num_blocks, at_once):
        last = min(first + at_once, num_blocks)
        span = Span(num_queries, length, first, last, query.device)
        chosen = chosen_blocks(
            query, estimates, span, settings, scale=scale, softcap=softcap, visible=visible
        )
        if observer is not None:
            observer(span, chosen)
        _attend_reference(
            query, keys, values, chosen, span, output, scale, softcap, sink_logits, visible
        )
    return output


def chosen_blocks(
    query: Tensor,
    estimates: Tensor,
    span: Span,
    settings: PrefillSettings,
    *,
    scale: float,
    softcap: float = 0.0,
    visible: Tensor | None = None,
) -> Tensor:
    """The key blocks that each block of queries of a span attends: bool ``[B, Hq, n, m]``."""
    log_masses = sampled_masses(
        query, estimates, span, scale=scale, softcap=softcap, visible=visible
    )
    return choose_blocks(
        pooled_shares(log_masses),
        candidate_blocks(span, visible),
        kept_blocks(span, sinks=settings.sinks, recent=settings.recent, visible=visible),
        mass=settings.mass,
        minimum=-(-settings.minimum // KEY_BLOCK),
    )


def estimated_keys(index: KeyIndex, state: list[Tensor], length: int, dtype: torch.dtype) -> Tensor:
    """The keys as the index has them, ``[B, H, length, D]``: as large as the layer's keys."""
    batch_size, num_kv_heads = state[0].shape[:2]
    keys = state[0].new_empty((batch_size, num_kv_heads, length, index.head_dim), dtype=dtype)
    for tile in range(0, num_tiles(length), _TILES_AT_ONCE):
        part = [
            tensor[:, :, tile : tile + _TILES_AT_ONCE] if is_tiled else tensor
            for tensor, is_tiled in zip(state, index.tiled, strict=True)
        ]
        start = tile * TILE_SIZE
        stop = min(start + _TILES_AT_ONCE * TILE_SIZE, length)
        keys[:, :, start:stop] = index.dequantize(part, stop - start)
    return keys


def _attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: Tensor,
    span: Span,
    output: Tensor,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    visible: Tensor | None,
) -> None:
    """Dense attention under the mask, a few queries at a time, over what comes before them."""
    rows_at_once = max(_ELEMENTS_AT_ONCE // (query.shape[0] * query.shape[1] * span.length), 1)
    for start in range(span.rows.start, span.rows.stop, rows_at_once):
        rows = slice(start, min(start + rows_at_once, span.rows.stop))
        stop = span.stored + rows.stop  # nothing behind it is visible
        row = torch.arange(rows.start, rows.stop, device=span.device)
        token = torch.arange(stop, device=span.device)
        blocks = chosen[:, :, row // QUERY_BLOCK - span.first]
        allowed = blocks.repeat_interleave(KEY_BLOCK, 3)[..., :stop]
        allowed = allowed & (token <= span.stored + row[:, None])
        if visible is not None:
            allowed = allowed & rows_visible(visible, rows)[..., :stop]
        attended = masked_attention(
            query[:, :, rows], keys[:, :, :stop], values[:, :, :stop], allowed,
            scale=scale, softcap=softcap, sink_logits=sink_logits,
        )  # fmt: skip
        output[:, rows] = attended.transpose(1, 2)
