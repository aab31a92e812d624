"""The call of FlexAttention: within a compiled model, compiled by itself, or eager on a CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from fierpatch.flex.block_mask import decode_block_mask
from fierpatch.flex.masks import MaskMod, QueryLayout, selected_mask_mod

_MOST_STAGED = 96 << 10  # bytes of K and V in flight, which every GPU since the A100 has room for
_RECOMPILE_LIMIT = 64  # shapes of eager steps: a few batches and budgets, queries from 1 to 8
_STAGES = 3  # with 4 warps the best of what was tried on an H100, where the defaults are poor

# On a CPU the kernel compiles neither over a query that is computed in the graph and reshaped, nor
# over sinks that are cast there, nor before anything that could be fused into it (torch 2.13): a
# copy that is opaque parts them.
_LIBRARY = torch.library.Library("fierpatch", "FRAGMENT")
_LIBRARY.define("flex_apart(Tensor output) -> Tensor")
_LIBRARY.impl("flex_apart", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("fierpatch::flex_apart", torch.empty_like, lib=_LIBRARY)


@dataclass(frozen=True)
class Form:
    """All of one call that is no tensor, so that a change of it compiles anew.

    Args:
        layout: what the query axis holds.
        block_size: keys of a block.
        scale: multiplies ``q . k``.
        softcap: where positive, logits become ``softcap * tanh(logits / softcap)``.
        num_queries: T, of the lists that rows were gathered by.
        with_lse: give the log-sum-exp too.
    """

    layout: QueryLayout
    block_size: int
    scale: float
    softcap: float
    num_queries: int
    with_lse: bool


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    allowed: Tensor,
    num_blocks: Tensor,
    block_indices: Tensor,
    sinks: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor | None]:
    """Attention of every row of queries over the tokens allowed.

    Args:
        query: ``[B, heads, rows, D]`` in ``form.layout``.
        keys, values: ``[B, heads, S, D]`` and ``[B, heads, S, Dv]``.
        allowed: int32 words ``[B, L, T, W]`` as in `SelectionMask`, or bool ``[B, heads, S]``.
        num_blocks, block_indices: int32 ``[B, heads, 1]`` and ``[B, heads, 1, blocks]``.
        sinks: ``[Hq]``, logits that take the place of the score of key 0; None means none do.
        form: the rest.

    Returns:
        ``[B, heads, rows, Dv]``, and the log-sum-exp ``[B, heads, rows]`` or None.
    """
    if not query.is_cuda or torch.compiler.is_compiling():
        return _attend(query, keys, values, allowed, num_blocks, block_indices, sinks, form)
    # Past the limit it would be an error; the default of 8 is less than the lengths of queries.
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
        return _compiled(query, keys, values, allowed, num_blocks, block_indices, sinks, form)


def kernel_options(keys: Tensor, values: Tensor, block_size: int) -> Any:
    """What torch is told of the kernel, for keys and values read in blocks of this size."""
    if not keys.is_cuda:
        # Or one query over 512 keys and more is given to a template that does not compile without
        # full blocks, and with them leaves what has no tokens unwritten (torch 2.13).
        return {"PARTITION_SIZE": 1}
    width = max(1 << (each.shape[3] - 1).bit_length() for each in (keys, values))
    staged = _STAGES * 2 * min(block_size, 64) * width * keys.element_size()
    # By its name the kernel for decode is used or it is an error.
    return {
        "BACKEND": "TRITON_DECODE",
        "num_stages": _STAGES if staged <= _MOST_STAGED else 1,
        "num_warps": 4,
    }


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    allowed: Tensor,
    num_blocks: Tensor,
    block_indices: Tensor,
    sinks: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor | None]:
    layout, softcap, num_queries = form.layout, form.softcap, form.num_queries
    num_rows = query.shape[2]
    is_compiling = torch.compiler.is_compiling()
    if sinks is not None and is_compiling:
        sinks = _apart(sinks)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        logit = torch.tanh(score / softcap) * softcap if softcap > 0 else score
        if sinks is None:
            return logit
        return torch.where(kv_idx == 0, sinks[h // num_queries * num_rows + q_idx], logit)

    block_mask = decode_block_mask(
        num_blocks,
        block_indices,
        _rows_mask_mod(allowed) if allowed.ndim == 3 else selected_mask_mod(layout, allowed),
        seq_lengths=(num_rows, keys.shape[2]),
        block_size=form.block_size,
    )
    if is_compiling:
        output, aux = flex_attention(
            _apart(query),
            keys,
            values,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=form.scale,
            kernel_options=kernel_options(keys, values, form.block_size),
            return_aux=AuxRequest(lse=form.with_lse),
        )
        return _apart(output), aux.lse
    # What flex_attention itself comes to in its eager mode, past a compiler that traces it anew at
    # each new shape and a warning that it is slow.
    output, lse, *_ = torch.ops.higher_order.flex_attention(
        query, keys, values, score_mod, block_mask.as_tuple(), form.scale, {}
    )
    return output, lse * math.log(2.0) if form.with_lse else None


_compiled = torch.compile(_attend, fullgraph=True, dynamic=False)


def _apart(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else torch.ops.fierpatch.flex_apart.default(tensor)


def _rows_mask_mod(is_used: Tensor) -> MaskMod:
    def used(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return is_used[b, h, kv_idx]

    return used
