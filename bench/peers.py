"""What one layer is measured against: dense attention, and torch's own top-k and gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

Function = Callable[[], object]

# Explicit, because the defaults are poor on an H100 and another backend would be a silent fallback.
FLEX_OPTIONS = {"BACKEND": "TRITON_DECODE", "num_stages": 3, "num_warps": 4}


def dense(query: Tensor, keys: Tensor, values: Tensor, *, with_flex: bool) -> dict[str, Function]:
    """Dense decode attention of one token, by every way that torch has.

    Args:
        query: ``[B, Hq, 1, D]``.
        keys: ``[B, H, S, D]``, like `values`.
        values: as `keys`.
        with_flex: FlexAttention too, which takes long to compile.
    """

    def attend() -> Tensor:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def by(backend: SDPBackend) -> Function:
        def attend_by_it() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        return attend_by_it

    peers: dict[str, Function] = {
        "SDPA": attend,
        "SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "SDPA FlashAttention": by(SDPBackend.FLASH_ATTENTION),
    }
    if with_flex:
        peers["FlexAttention"] = _flex(query, keys, values)
    return peers


def _flex(query: Tensor, keys: Tensor, values: Tensor) -> Function:
    torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    # The query group becomes the query length; with enable_gqa the kernel is a slower one.
    folded = query.view(*keys.shape[:2], -1, query.shape[3])  # [B, H, G, D]
    options: dict[str, Any] = {"kernel_options": FLEX_OPTIONS} if query.is_cuda else {}
    return lambda: compiled(folded, keys, values, **options)


def pieces(keys: Tensor, values: Tensor, budget: int) -> dict[str, Function]:
    """Top-k over a score for every token, gather of rows and append of one, as torch has them.

    Args:
        keys: ``[B, H, S, D]``, like `values`.
        values: as `keys`.
        budget: rows to choose for each KV head.
    """
    batch_size, num_kv_heads, length, head_dim = keys.shape
    scores = torch.randn(batch_size * num_kv_heads, length, device=keys.device)
    halves = scores.bfloat16()
    chosen = scores.topk(budget).indices.sort().values.view(batch_size, num_kv_heads, budget, 1)
    rows = chosen.expand(-1, -1, -1, head_dim)
    row = keys[:, :, :1].clone()
    last = torch.tensor([length - 1], device=keys.device)

    def gather() -> tuple[Tensor, Tensor]:
        return keys.gather(2, rows), values.gather(2, rows)

    def append() -> None:
        keys.index_copy_(2, last, row)
        values.index_copy_(2, last, row)

    return {
        "torch.topk float32": lambda: scores.topk(budget),
        "torch.topk bfloat16": lambda: halves.topk(budget),
        "torch.gather K, V": gather,
        "torch.index_copy_ K, V": append,
    }
