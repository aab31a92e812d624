"""Stores: the keys and values of one layer, on the device or on the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fierpatch.offload.memory import MemoryPool
from fierpatch.offload.transfer import Transfer, copy_to_parts
from fierpatch.rows import pair, split

_MOST_TOKENS = 1 << 20  # that addresses are reserved for, where the model sets no limit
_CHUNK = 64 << 20  # bytes of rows that are on the device at once while their order changes


class Store(Protocol):
    """What a layer's cache asks of the place where its keys and values are."""

    @property
    def rows(self) -> list[Tensor]:
        """Keys and values, or paired rows alone, as operators take them: see `fierpatch.rows`."""

    @property
    def keys(self) -> Tensor:
        """``[B, H, C, D]`` as a tensor of the device, wherever its memory is."""

    @property
    def values(self) -> Tensor:
        """``[B, H, C, Dv]``, likewise."""

    @property
    def device_nbytes(self) -> int:
        """Bytes held on the device."""

    @property
    def host_nbytes(self) -> int:
        """Bytes held on the host."""

    def grow(self, capacity: int) -> None:
        """Make room for so many tokens, more than before."""

    def write(self, key: Tensor, value: Tensor, start: int) -> None:
        """Store the tokens of a prompt from `start` on, perhaps beside the computation."""

    def join(self) -> None:
        """Let the computation wait until all prompts are stored, of all layers of the cache."""

    def read(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The first `start` tokens and those of a prompt behind them, all on the device.

        Valid when the prompt is written too.
        """

    def read_ahead(self, start: int, num_new: int) -> None:
        """Begin to read for the `read` that comes next, of a prompt of so many tokens."""

    def forget(self, num_tokens: int) -> None:
        """Expect other tokens behind the first so many."""

    def read_all(self, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All rows, on the device; for a prompt that is compiled, of whose end a counter tells."""

    def take(self, rows: Tensor, num_tokens: int) -> None:
        """Make row i of the batch a copy of row ``rows[i]``, in place where there are as many."""

    def clear(self) -> None:
        """Let no row that is there now reach a later result."""


class DeviceStore:
    """Keys and values in a buffer each, beside the model.

    Args:
        key: ``[B, H, T, D]``, gives shape, dtype and device.
        value: ``[B, H, T, Dv]``.
        capacity: tokens to make room for.
    """

    host_nbytes = 0

    def __init__(self, key: Tensor, value: Tensor, capacity: int) -> None:
        self.rows = [
            like.new_zeros((*like.shape[:2], capacity, like.shape[3])) for like in (key, value)
        ]

    @property
    def keys(self) -> Tensor:
        """See `Store`."""
        return self.rows[0]

    @property
    def values(self) -> Tensor:
        """See `Store`."""
        return self.rows[1]

    @property
    def device_nbytes(self) -> int:
        """See `Store`."""
        return sum(tensor.nbytes for tensor in self.rows)

    def grow(self, capacity: int) -> None:
        """See `Store`."""
        # One after the other, so that the old one's memory is free when the next is made.
        for place in range(len(self.rows)):
            self.rows[place] = _grown(self.rows[place], capacity)

    def write(self, key: Tensor, value: Tensor, start: int) -> None:
        """See `Store`."""
        stop = start + key.shape[2]
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = key, value

    def join(self) -> None:
        """See `Store`."""

    def read(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """See `Store`."""
        stop = start + key.shape[2]
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def read_ahead(self, start: int, num_new: int) -> None:
        """See `Store`."""

    def forget(self, num_tokens: int) -> None:
        """See `Store`."""

    def read_all(self, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Store`."""
        return self.keys[:], self.values[:]

    def take(self, rows: Tensor, num_tokens: int) -> None:
        """See `Store`."""
        for place, tensor in enumerate(self.rows):
            taken = tensor.index_select(0, rows)
            self.rows[place] = tensor.copy_(taken) if len(rows) == len(tensor) else taken

    def clear(self) -> None:
        """See `Store`."""
        # Stale rows are masked, but a NaN among them would pass a weight of 0.
        for tensor in self.rows:
            tensor.zero_()


class HostStore:
    """Paired rows in memory of the host, which the device reads and writes where they are.

    Args:
        key: ``[B, H, T, D]``, gives shape, dtype and device.
        value: ``[B, H, T, Dv]``.
        capacity: tokens to make room for.
        most_tokens: tokens that there will ever be; None means no limit.
        transfer: copies prompts, for all layers of a cache.
        pool: gives the memory, and has it back when the store is gone.

    Raises:
        HostMemoryError: the host has too little memory, or does not pin it.
    """

    device_nbytes = 0

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        capacity: int,
        most_tokens: int | None,
        transfer: Transfer,
        pool: MemoryPool,
    ) -> None:
        self._head_dim = key.shape[3]
        self._dtype, self._device = key.dtype, key.device
        self._most_tokens = max(most_tokens or _MOST_TOKENS, capacity)
        self._transfer, self._pool = transfer, pool
        self._give_back: Callable[[], object] = lambda: None
        self._ahead: _Ahead | None = None
        self._allocate(key.shape[0], key.shape[1], key.shape[3] + value.shape[3], capacity)

    @property
    def paired(self) -> Tensor:
        """``[C, B, H, D + Dv]`` as a tensor of the device."""
        return self.rows[0]

    @property
    def keys(self) -> Tensor:
        """See `Store`."""
        return split(self.rows, self._head_dim)[0]

    @property
    def values(self) -> Tensor:
        """See `Store`."""
        return split(self.rows, self._head_dim)[1]

    @property
    def host_nbytes(self) -> int:
        """See `Store`."""
        return self.paired.nbytes

    def grow(self, capacity: int) -> None:
        """See `Store`."""
        self._view((capacity, *self.paired.shape[1:]))

    def take(self, rows: Tensor, num_tokens: int) -> None:
        """See `Store`."""
        self._transfer.join()
        self._ahead = None
        old = self.paired
        capacity, batch_size, num_heads, width = old.shape
        if rows.tolist() == list(range(batch_size)):
            return  # as often in beam search, and all rows would cross PCIe twice
        if len(rows) != batch_size:
            self._allocate(len(rows), num_heads, width, capacity)
        chunk = max(_CHUNK // max(old[:1].nbytes, 1), 1)
        for start in range(0, num_tokens, chunk):
            stop = min(start + chunk, num_tokens)
            taken = old[start:stop].index_select(1, rows)
            copy_to_parts(taken, self._parts(self.paired, start, stop))

    def clear(self) -> None:
        """See `Store`."""
        self._ahead = None
        # Dense attention over a whole static buffer passes a weight of 0 to what is not stored.
        for part in self._parts(self.paired, 0, self.paired.shape[0]):
            part.zero_()

    def write(self, key: Tensor, value: Tensor, start: int) -> None:
        """See `Store`. Beside the computation."""
        self.forget(start)
        parts = self._parts(self._host, start, start + key.shape[2])
        self._transfer.send(pair(key, value), parts)

    def join(self) -> None:
        """See `Store`."""
        self._transfer.join()

    def read(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """See `Store`."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.lengths != (start, key.shape[2]):
            ahead = self._receive(start, key.shape[2])
        ahead.wait()
        keys, values = split([ahead.paired], self._head_dim)
        keys[:, :, start:], values[:, :, start:] = key, value
        return keys, values

    def read_ahead(self, start: int, num_new: int) -> None:
        """See `Store`. Beside the computation."""
        self._ahead = self._receive(start, num_new)

    def forget(self, num_tokens: int) -> None:
        """See `Store`."""
        if self._ahead is not None and num_tokens < self._ahead.lengths[0]:
            self._ahead = None

    def read_all(self, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Store`. Rows behind the last token are 0, whatever is there."""
        token = torch.arange(self.paired.shape[0], device=self.paired.device)
        is_stale = (token >= num_tokens)[:, None, None, None]
        # By one kernel: masked_fill would copy all rows first, over the ends of pieces.
        return split([torch.where(is_stale, 0.0, self.paired)], self._head_dim)

    def _receive(self, start: int, num_new: int) -> _Ahead:
        paired = self.paired.new_empty((start + num_new, *self.paired.shape[1:]))
        wait = self._transfer.receive(self._parts(self._host, 0, start), paired[:start])
        return _Ahead((start, num_new), paired, wait)

    def _parts(self, rows: Tensor, start: int, stop: int) -> list[Tensor]:
        """Tokens ``start .. stop`` of all rows, flat and cut where pieces of the memory end."""
        flat, size, token = rows.view(-1), rows.itemsize, rows[:1].nbytes
        parts = self._memory.parts(start * token, stop * token)
        return [flat[first // size : last // size] for first, last in parts]

    def _allocate(self, batch_size: int, num_heads: int, width: int, capacity: int) -> None:
        row = batch_size * num_heads * width * self._dtype.itemsize
        memory = self._pool.take(capacity * row, self._most_tokens * row, self._device)
        self._give_back()
        self._memory = memory
        finalizer = weakref.finalize(self, self._pool.give_back, memory)
        finalizer.atexit = False
        self._give_back = finalizer
        self._view((capacity, batch_size, num_heads, width))

    def _view(self, shape: tuple[int, ...]) -> None:
        self._memory.grow(torch.Size(shape).numel() * self._dtype.itemsize)
        self._host = self._memory.host(shape, self._dtype)
        self.rows = [self._memory.on_device(shape, self._dtype)]


class _Ahead(NamedTuple):
    """What is being read for a prompt."""

    lengths: tuple[int, int]  # of what is stored, and of the prompt
    paired: Tensor  # with room for both
    wait: Callable[[], None]


def _grown(tensor: Tensor, capacity: int) -> Tensor:
    larger = tensor.new_zeros((*tensor.shape[:2], capacity, tensor.shape[3]))
    larger[:, :, : tensor.shape[2]] = tensor
    return larger
