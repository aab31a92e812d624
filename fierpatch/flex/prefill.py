"""Sparse prefill: a prompt attends the blocks of keys that hold most of its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from fierpatch.flex.limits import check_head_dims
from fierpatch.flex.span_attention import (
    ELEMENTS_AT_ONCE,
    Operands,
    attend_flex,
    attend_reference,
)
from fierpatch.index import KeyIndex
from fierpatch.index.packing import TILE_SIZE, num_tiles

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
    operands: Operands,
    estimates: Tensor,
    settings: PrefillSettings,
    *,
    backend: str = "reference",
    observer: BlockObserver | None = None,
) -> Tensor:
    """Causal attention of the newest tokens over the key blocks chosen for them.

    Spans of query blocks, one after the other: choose by `estimates`, then attend. A span is as
    long as it can be without a temporary of more than 2^22 elements (reference) or 2^26 (kernels);
    one block of queries is the least. A block has ``8 B Hq S`` sampled scores in the reference, and
    with kernels, which keep scores to themselves, ``8 B Hq S / 64`` masses of key blocks.

    Args:
        operands: queries, keys, values and what becomes of their products.
        estimates: ``[B, H, S, D]``, what stands for the keys when blocks are chosen.
        settings: how many are chosen.
        backend: ``"reference"``, or ``"triton"``: a kernel that weighs blocks, and FlexAttention,
            compiled. The reference visits all blocks and masks what was not chosen.
        observer: is told of each span's choice.

    Returns:
        ``[B, T, Hq, Dv]`` in the query's dtype; 0 for a query that sees nothing.

    Raises:
        BackendError: kernels were asked for, and FlexAttention has none for such keys and values.
    """
    if backend != "reference":
        remedy = 'apply with prefill="dense", or with backend="reference"'
        check_head_dims('prefill="sparse"', operands.keys, operands.values, remedy=remedy)
    query, values = operands.query, operands.values
    batch_size, num_query_heads, num_queries, _ = query.shape
    output = query.new_empty((batch_size, num_queries, num_query_heads, values.shape[3]))
    attend = attend_reference if backend == "reference" else attend_flex
    for span, chosen in chosen_spans(operands, estimates, settings, backend=backend):
        if observer is not None:
            observer(span, chosen)
        output[:, span.rows] = attend(operands, span, chosen).transpose(1, 2)
    return output


def chosen_spans(
    operands: Operands,
    estimates: Tensor,
    settings: PrefillSettings,
    *,
    backend: str = "reference",
) -> Iterator[tuple[Span, Tensor]]:
    """The spans of a prompt and what `chosen_blocks` gives each; see `sparse_attention`."""
    batch_size, num_query_heads, num_queries, _ = operands.query.shape
    length = operands.keys.shape[2]
    if backend != "reference":
        estimates = estimates.contiguous()  # once, and not for every span
    num_blocks = -(-num_queries // QUERY_BLOCK)
    size = batch_size * num_query_heads * SAMPLES
    size *= length if backend == "reference" else -(-length // KEY_BLOCK)
    at_once = max(ELEMENTS_AT_ONCE[backend] // size, 1)
    for first in range(0, num_blocks, at_once):
        last = min(first + at_once, num_blocks)
        span = Span(num_queries, length, first, last, operands.query.device)
        yield span, chosen_blocks(operands, estimates, span, settings, backend=backend)


def chosen_blocks(
    operands: Operands,
    estimates: Tensor,
    span: Span,
    settings: PrefillSettings,
    *,
    backend: str = "reference",
) -> Tensor:
    """The key blocks that each block of queries of a span attends: bool ``[B, Hq, n, m]``.

    Arguments as in `sparse_attention`.
    """
    visible = operands.visible
    if backend == "reference":
        log_masses = sampled_masses(
            operands.query, estimates, span,
            scale=operands.scale, softcap=operands.softcap, visible=visible,
        )  # fmt: skip
    else:
        # Not before it is needed: this imports triton.
        from fierpatch.kernels.block_masses import block_masses
        from fierpatch.kernels.logits import Logits

        samples = span.samples
        log_masses = block_masses(
            operands.query[:, :, samples],
            estimates,
            span.stored + samples,
            Logits(operands.scale, operands.softcap),
            None if visible is None else rows_visible(visible, samples),
            key_block=KEY_BLOCK,
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
