"""What one layer is measured against: dense attention, and torch's own top-k and gather."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Function = Callable[[], object]


def dense(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Function]:
    """Dense decode attention of one token, by torch's own kernels.

    Args:
        query: ``[B, Hq, 1, D]``.
        keys: ``[B, H, S, D]``, like `values`.
        values: as `keys`.
    """

    def attend() -> Tensor:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def by(backend: SDPBackend) -> Function:
        def attend_by_it() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        return attend_by_it

    return {
        "SDPA": attend,
        "SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "SDPA FlashAttention": by(SDPBackend.FLASH_ATTENTION),
    }


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
