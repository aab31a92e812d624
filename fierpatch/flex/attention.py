"""Exact attention over selected tokens, by FlexAttention, in one of two modes.

``"mask"`` reads K and V where they lie, block by block, under a `SelectionMask`. ``"compact"``
copies the selected rows into a small buffer and reads that. In both the query heads that share a
list are folded into the query length, so that a program reads a row once for all of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fierpatch.errors import ConfigError
from fierpatch.flex.block_mask import check_block_size
from fierpatch.flex.fused import Form, attend
from fierpatch.flex.limits import check_lse, check_rows, check_tensors
from fierpatch.flex.masks import QueryLayout
from fierpatch.flex.rows import gather_rows
from fierpatch.flex.selection import SelectionMask

Mode = Literal["mask", "compact"]


def selected_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    token_indices: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    mode: Mode = "compact",
    block_size: int = 16,
    is_ascending: bool = False,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention over the chosen tokens only; `gather_attention` is its specification.

    Within a compiled function it becomes part of the graph. Elsewhere its kernel is compiled by
    itself on CUDA, and eager FlexAttention computes it on a CPU, unfused. It has no gradient.

    Args:
        query: ``[B, Hq, T, D]``.
        keys: ``[B, H, S, D]``.
        values: ``[B, H, S, Dv]``; by mask, those in a block with a chosen token have to be finite,
            and where it is eager all of them.
        token_indices: integers ``[B, H or Hq, T, K]``, distinct within a list; -1 marks an unused
            slot.
        scale, softcap, sink_logits: as in `attention_weights`.
        mode: ``"compact"``, or ``"mask"``, which on an H100 took longer for a selection of 1,024 of
            131,072 tokens, in runs of 64 and anywhere; it copies nothing.
        block_size: keys of a block, 16, 32, 64 or 128.
        is_ascending: every list is in ascending order with its unused slots at the end.
        with_lse: also the logarithm of the summed exponentials, to merge with other attention.

    Returns:
        ``[B, Hq, T, Dv]`` in the query's dtype, 0 for a query without tokens; and ``[B, Hq, T]``,
        float32 or float64 where the query is, sinks included and -inf for a query without tokens,
        or None.

    Raises:
        ShapeError: the tensors do not fit each other.
        ConfigError: an unknown mode, or blocks that no kernel takes.
        BackendError: FlexAttention cannot do it here; the message says what can.
    """
    check_block_size(block_size)
    check_tensors(query, keys, values, token_indices)
    if mode not in ("mask", "compact"):
        raise ConfigError(f"unknown mode {mode!r}: choose from 'mask', 'compact'")
    num_groups, num_queries = query.shape[1] // keys.shape[1], query.shape[2]
    num_lists = token_indices.shape[1]
    is_compiling, is_cuda = torch.compiler.is_compiling(), query.is_cuda
    has_sinks = sink_logits is not None
    is_mask = mode == "mask"
    needs_lse = with_lse or (is_mask and has_sinks)
    if needs_lse:
        check_lse(is_cuda=is_cuda, is_compiling=is_compiling)
    if is_mask:
        layout = QueryLayout(query.shape[1], num_queries, num_groups)
    else:
        # Each query of a list reads rows of its own, so it is a head of its own.
        folded = query.shape[1] // num_lists
        layout = QueryLayout(query.shape[1] * num_queries, 1, folded)
    check_rows(layout.num_rows, mode=mode, is_cuda=is_cuda)
    form = Form(layout, block_size, scale, softcap, num_queries, needs_lse)
    with torch.no_grad():
        run = _by_mask if is_mask else _by_rows
        output, lse = run(
            query.detach(), keys.detach(), values.detach(), token_indices,
            None if sink_logits is None else sink_logits.detach(), form, is_ascending,
        )  # fmt: skip
        has_any = (token_indices >= 0).any(-1)  # [B, L, T]
        has_any = has_any.repeat_interleave(query.shape[1] // num_lists, 1)
        # What has no tokens may have read others, which may be NaN.
        output = torch.where(has_any.unsqueeze(3), output, 0.0)
        if lse is not None:
            lse = torch.where(has_any, lse, -torch.inf)
    return output, lse if with_lse else None


def _by_mask(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    token_indices: Tensor,
    sink_logits: Tensor | None,
    form: Form,
    is_ascending: bool,
) -> tuple[Tensor, Tensor | None]:
    mask = SelectionMask.of(
        form.layout,
        token_indices,
        length=keys.shape[2],
        block_size=form.block_size,
        is_ascending=is_ascending,
    )
    folded = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B, H, G * T, D]
    output, lse = attend(
        folded, keys, values, mask.words, mask.num_blocks, mask.block_indices, None, form
    )
    output = output.unflatten(2, (-1, form.num_queries)).flatten(1, 2)
    if lse is None:
        return output, None
    lse = lse.unflatten(2, (-1, form.num_queries)).flatten(1, 2)  # [B, Hq, T]
    if sink_logits is not None:
        # A sink has a weight and no value, so all it does is to shrink the others' share.
        sinks = sink_logits.to(lse.dtype)[:, None]
        output = (output * torch.sigmoid(lse - sinks).unsqueeze(3)).to(query.dtype)
        lse = torch.logaddexp(lse, sinks)
    return output, lse


def _by_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    token_indices: Tensor,
    sink_logits: Tensor | None,
    form: Form,
    is_ascending: bool,
) -> tuple[Tensor, Tensor | None]:
    # A sink is a row of zeros in front whose score is the sink's logit, which needs no log-sum-exp.
    gathered = gather_rows(
        keys,
        values,
        token_indices,
        with_sink=sink_logits is not None,
        block_size=form.block_size,
    )
    num_lists = token_indices.shape[1]
    grouped = query.unflatten(1, (num_lists, -1)).transpose(2, 3).flatten(1, 2)
    sinks = None
    if sink_logits is not None:
        sinks = sink_logits.to(torch.promote_types(query.dtype, torch.float32))
    output, lse = attend(grouped, *gathered, sinks, form)  # [B, lists * T, G, Dv]
    output = output.unflatten(1, (num_lists, -1)).transpose(2, 3).flatten(1, 2)
    if lse is not None:
        lse = lse.unflatten(1, (num_lists, -1)).transpose(2, 3).flatten(1, 2)
    return output, lse
