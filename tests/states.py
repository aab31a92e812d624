"""Reading the state of a key index: what it holds for its tokens, whatever lies behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch.index import KeyIndex, RotatedIndex
from fierpatch.index.packing import read_bits


def build(
    index: KeyIndex,
    keys: Tensor,
    length: int | None = None,
    *,
    balance: Tensor | None = None,
    capacity: int = 0,
) -> list[Tensor]:
    """The state of the first `length` keys, appended at once; with the balance of another state."""
    batch_size, num_kv_heads, num_rows, _ = keys.shape
    length = num_rows if length is None else length
    state = index.allocate(batch_size, num_kv_heads, max(capacity, length), keys.device)
    if balance is not None:
        state[3].copy_(balance)
    index.append(state, keys, 0, length)
    return state


def bits_of(state: list[Tensor], length: int) -> Tensor:
    """Bool ``[B, H, length, bits, D]``, the high bit first."""
    sets = state[0].unflatten(3, (-1, 32)).unbind(3)
    return torch.stack([read_bits(planes)[:, :, :length] for planes in sets], dim=3)


def by_group(tensor: Tensor, group_size: int, length: int) -> Tensor:
    """``[B, H, groups, D]`` of the groups that `length` tokens touch."""
    return tensor.flatten(2, 3)[:, :, : -(-length // group_size)]


def held(index: KeyIndex, state: list[Tensor], length: int) -> dict[str, Tensor]:
    """What the state says of tokens ``0 .. length``, by name, and its constants."""
    parts = {"bits": bits_of(state, length)}
    if isinstance(index, RotatedIndex):
        parts["scale"] = state[1].flatten(2)[:, :, :length]
        parts["centre"] = by_group(state[2], index.group_size, length)
        parts["balance"], parts["rotation"] = state[3], state[-1]
        if index.refine_bits:
            parts["codes"], parts["ratio"] = (x.flatten(2, 3)[:, :, :length] for x in state[4:6])
    else:
        parts["scale"] = by_group(state[1], index.group_size, length)
        parts["zero"] = by_group(state[2], index.group_size, length)
    return parts


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal to the last bit; NaN equals nothing."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_equal_states(one: list[Tensor], other: list[Tensor]) -> None:
    """Equal to the last bit, unused cells included; NaN equals nothing."""
    for place, (tensor, twin) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(tensor, twin), f"tensor {place} of the state"
