"""Keys and values in memory of the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fierpatch.offload.memory import MemoryPool
from fierpatch.offload.transfer import Transfer, copy_to_parts
from fierpatch.rows import pair, split

_MOST_TOKENS = 1 << 20  # that addresses are reserved for, where the model sets no limit
_CHUNK = 64 << 20  # bytes of rows that are on the device at once while their order changes


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
