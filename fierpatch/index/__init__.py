"""Key indexes: what is read at every step instead of the keys."""

from __future__ import annotations

from fierpatch.errors import ConfigError
from fierpatch.index.base import KeyIndex, map_batch, nbytes, resize
from fierpatch.index.fier import FierIndex
from fierpatch.index.rotated import RotatedIndex

__all__ = ["FierIndex", "KeyIndex", "RotatedIndex", "make_index", "map_batch", "nbytes", "resize"]


def make_index(
    name: str,
    *,
    head_dim: int,
    bits: int = 1,
    group_size: int | None = None,
    seed: int = 0,
    refine_bits: int = 0,
) -> KeyIndex:
    """The index called `name`, for keys of `head_dim` channels.

    Raises:
        ConfigError: no index has that name, or it has no such bits or group_size.
    """
    if name == "rotated":
        return RotatedIndex(
            head_dim,
            bits=bits,
            group_size=group_size or 128,
            seed=seed,
            refine_bits=refine_bits,
        )
    if name == "fier":
        if bits != 1:
            raise ConfigError(f'bits={bits} is not available for "fier": 1, or index "rotated"')
        if refine_bits:
            raise ConfigError(f'refine_bits={refine_bits} is not available for "fier": 0')
        return FierIndex(head_dim, group_size=group_size or 32)
    raise ConfigError(f"unknown index {name!r}: choose from 'rotated', 'fier'")
