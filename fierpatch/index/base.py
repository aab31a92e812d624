"""What every key index is: the protocol, and the state its tensors travel in."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fierpatch.errors import ConfigError
from fierpatch.index.packing import ROWS, TILE_SIZE, num_tiles

FLOAT16_MAX = 65504.0


class KeyIndex(Hashable, Protocol):
    """What stands for the keys of one layer when tokens are scored.

    An index is a frozen description; its tensors are a list, the *state*, so that operators can
    take and mutate them. Every tensor but the last `num_constants` leads with B, and those of
    `tiled` have their tiles on axis 2. The state is a function of keys ``0 .. length`` (and of the
    calibration) alone: appending in one call or token by token gives equal tensors.
    """

    num_constants: ClassVar[int]

    @property
    def tiled(self) -> tuple[bool, ...]:
        """Which tensors have their tiles on axis 2."""

    @property
    def candidate_margin(self) -> float:
        """The margin by which candidates for a second scoring are best chosen."""

    @property
    def head_dim(self) -> int:
        """Channels of a key."""

    @property
    def group_size(self) -> int:
        """Tokens that are indexed as one; appending may start anew from any multiple of it."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of index a token and KV head, in the limit of a long context."""

    @property
    def scanned_bytes_per_token(self) -> float:
        """Those of them that `scores` reads."""

    @property
    def refined_bytes_per_token(self) -> float:
        """What `refined_scores` reads of a token, 0 without codes."""

    def allocate(
        self, batch_size: int, num_kv_heads: int, num_tokens: int, device: torch.device
    ) -> list[Tensor]:
        """An empty state with room for `num_tokens` tokens, rounded up to tiles of 512."""

    def append(self, state: list[Tensor], keys: Tensor, start: int, stop: int) -> None:
        """Index tokens ``start .. stop`` of ``keys [B, H, C, D]``, where token t is row t.

        Tokens before `start` are indexed already; those of a group left open are read again.
        Also re-indexes: the state then equals that of appending ``0 .. stop`` from nothing.
        """

    def calibrate(self, state: list[Tensor], query: Tensor, keys: Tensor, length: int) -> bool:
        """Fit the index to sampled queries ``[B, H, n, D]`` and the first `length` keys.

        Returns True if the state must be appended anew from token 0.
        """

    def scores(
        self, state: list[Tensor], query: Tensor, length: int, *, margin: float = 0.0
    ) -> Tensor:
        """Estimates of ``q . k`` for ``query [B, H, M, D]``: float32 ``[B, H, M, length]``.

        With a margin, bounds from above that few tokens exceed.
        """

    def refined_scores(self, state: list[Tensor], query: Tensor, tokens: Tensor) -> Tensor:
        """Better estimates of ``q . k`` for some tokens, by codes that `scores` does not read.

        Args:
            query: float32 ``[B, H, R, G, D]``.
            tokens: int64 ``[B, H, R, n]``, the same for G query heads.

        Returns:
            float32 ``[B, H, R, G, n]``.

        Raises:
            ConfigError: this index has no such codes.
        """

    def dequantize(self, state: list[Tensor], length: int) -> Tensor:
        """The keys that `scores` sees: float32 ``[B, H, length, D]``."""


def nbytes(index: KeyIndex, state: list[Tensor]) -> int:
    """Bytes the state holds for its tokens, without the constants that all layers share."""
    own = state[: len(state) - index.num_constants]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def resize(index: KeyIndex, state: list[Tensor], num_tokens: int) -> list[Tensor]:
    """A state with room for `num_tokens` tokens that holds the same index."""
    grown = []
    for tensor, is_tiled in zip(state, index.tiled, strict=True):
        if is_tiled:
            shape = list(tensor.shape)
            shape[2] = num_tiles(num_tokens)
            larger = tensor.new_zeros(shape)
            kept = min(shape[2], tensor.shape[2])
            larger[:, :, :kept] = tensor[:, :, :kept]
            tensor = larger
        grown.append(tensor)
    return grown


def map_batch(
    index: KeyIndex, state: list[Tensor], change: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `change` to every tensor that leads with the batch."""
    own = len(state) - index.num_constants
    return [change(tensor) for tensor in state[:own]] + state[own:]


def check_group_size(group_size: int) -> None:
    """Raise ConfigError unless groups are whole bit planes and divide a tile."""
    if group_size < ROWS or group_size % ROWS or TILE_SIZE % group_size:
        raise ConfigError(
            f"group_size={group_size} does not divide a tile of {TILE_SIZE} tokens into whole bit "
            "planes: choose 32, 64, 128, 256 or 512"
        )


def finite_keys(keys: Tensor) -> Tensor:
    """Keys as float32 with NaN as 0 and magnitudes kept within float16.

    Padding may hold NaN, and an index must not let it reach its neighbours.
    """
    return torch.nan_to_num(keys.float(), nan=0.0).clamp(-FLOAT16_MAX, FLOAT16_MAX)


def to_float16(x: Tensor) -> Tensor:
    """Round to float16, saturating instead of overflowing."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
