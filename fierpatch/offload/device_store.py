"""Keys and values beside the model."""

from __future__ import annotations

from torch import Tensor


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


def _grown(tensor: Tensor, capacity: int) -> Tensor:
    larger = tensor.new_zeros((*tensor.shape[:2], capacity, tensor.shape[3]))
    larger[:, :, : tensor.shape[2]] = tensor
    return larger
