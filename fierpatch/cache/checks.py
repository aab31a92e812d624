"""What a layer's cache refuses before anything changes."""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch.errors import CacheMismatchError, FierError, PositionLimitError


def check_fit(key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
    """Check new tokens against the buffers ``[B, H, C, D]`` and ``[B, H, C, Dv]`` of the cache.

    Raises:
        CacheMismatchError: batch size, heads, head_dim, dtype or device differ.
        FierError: the keys want a gradient, which retrieval has none of.
    """
    if torch.is_grad_enabled() and key.requires_grad:
        raise FierError(
            "retrieval has no backward, and the keys require a gradient: decode under "
            "torch.no_grad(), or train without a fierpatch cache"
        )
    for name, new, held in (("keys", key, keys), ("values", value, values)):
        if new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
            raise CacheMismatchError(
                f"the cache holds {name} of [B, H, D] = {_describe(held)} and was given "
                f"{_describe(new)}: it belongs to another model or batch size; start with a "
                "new cache"
            )
        if new.dtype != held.dtype or new.device != held.device:
            raise CacheMismatchError(
                f"the cache holds {name} as {held.dtype} on {held.device} and was given "
                f"{new.dtype} on {new.device}: it belongs to another model; start with a new "
                "cache"
            )


def check_positions(num_tokens: int, max_positions: int | None) -> None:
    """Check a length against the model's positions; None means no limit.

    Raises:
        PositionLimitError: it is past them.
    """
    if max_positions is not None and num_tokens > max_positions:
        raise PositionLimitError(
            f"{num_tokens} tokens are past the model's {max_positions} positions: "
            "shorten the prompt or generate fewer tokens"
        )


def _describe(tensor: Tensor) -> str:
    return str([tensor.shape[0], tensor.shape[1], tensor.shape[3]])
