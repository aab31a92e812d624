"""What a layer's cache asks of the place where its keys and values are."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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
