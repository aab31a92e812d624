"""Tensors as kernels may be given them: at any address, of any strides, in guarded buffers.

The checks of this folder run on any device, in Triton's interpreter and on a GPU. They import
kernels where they are called, because Triton decides on its first import whether it interprets.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

from fierpatch.index import KeyIndex, RotatedIndex

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 11)
LAYOUTS = ("contiguous", "transposed", "offset", "strided")


def few(num_examples: int) -> Any:
    """`num_examples` in the profile `ci`, and as many more or fewer as other profiles have."""
    return settings(max_examples=max(1, settings.default.max_examples * num_examples // 100))


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, or at an address that no vector load may take."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "offset":
        flat = tensor.new_zeros(tensor.numel() + 1)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    if layout == "strided":
        return torch.stack((tensor, tensor), dim=-1)[..., 0]
    return tensor


def words(tensor: Tensor) -> Tensor:
    """The bits of floats, so that NaN equals NaN."""
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN of that shape with 4096 more behind it: see `is_intact`."""
    flat = torch.full((math.prod(shape) + 4096,), torch.nan, dtype=dtype, device=device)
    return flat[:-4096].view(shape)


def is_intact(buffer: Tensor, num_written: int) -> bool:
    """Whether rows past `num_written`, and what lies behind the buffer, are as `guarded` made."""
    flat = buffer._base
    assert flat is not None
    return bool(buffer[:, :, num_written:].isnan().all() and flat[-4096:].isnan().all())


def set_balance(index: KeyIndex, state: list[Tensor], generator: torch.Generator) -> None:
    if isinstance(index, RotatedIndex):
        state[3].copy_(torch.randn(state[3].shape, generator=generator).exp())
