"""How the keys and values of a layer lie in memory: in a buffer each, or paired in one.

Paired rows are ``[C, B, H, D + Dv]``: key and value of a token side by side, one read for both, and
tokens outermost, so that a buffer grows in place and a prompt is one copy.
"""

from __future__ import annotations

from torch import Tensor


def split(rows: list[Tensor], head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys ``[B, H, C, D]`` and values ``[B, H, C, Dv]``, views both.

    Args:
        rows: the two of them, or paired rows alone.
        head_dim: D.
    """
    if len(rows) == 2:
        return rows[0], rows[1]
    by_head = rows[0].permute(1, 2, 0, 3)
    return by_head[..., :head_dim], by_head[..., head_dim:]


def pair(key: Tensor, value: Tensor) -> Tensor:
    """``[B, H, T, D]`` and ``[B, H, T, Dv]`` as new paired rows ``[T, B, H, D + Dv]``."""
    batch_size, num_heads, num_tokens, head_dim = key.shape
    width = head_dim + value.shape[3]
    paired = key.new_empty((num_tokens, batch_size, num_heads, width))
    for part, whole in zip(split([paired], head_dim), (key, value), strict=True):
        part.copy_(whole)
    return paired
