"""How far a layer's cache has come: what fits still, and when a prompt calibrates its index."""

from __future__ import annotations

from torch import Tensor

from fierpatch.errors import CapacityError
from fierpatch.index import KeyIndex
from fierpatch.reference import fold_groups

_MAX_CALIBRATION_QUERIES = 256
_CALIBRATION_WINDOW = 4096  # newest queries, which left padding reaches last


def calibrate_prompt(
    index: KeyIndex, query: Tensor, keys: Tensor, state: list[Tensor], progress: list[int]
) -> list[int]:
    """Calibrate by some of a prompt's newest queries where the tokens have doubled since.

    Doubling keeps the work of a prompt that comes in chunks within twice that of one that does not.

    Args:
        query: ``[B, Hq, T, D]``, the prompt's.
        keys: ``[B, H, C, D]``.
        progress: tokens stored, indexed, and at the last calibration.

    Returns:
        The progress, with nothing indexed where all has to be indexed anew.
    """
    stored, indexed, calibrated = progress
    if stored >= 2 * calibrated:
        window = min(query.shape[2], _CALIBRATION_WINDOW)
        step = -(-window // _MAX_CALIBRATION_QUERIES)
        sampled = query[:, :, query.shape[2] - window :][:, :, ::step]
        if index.calibrate(state, fold_groups(sampled, keys.shape[1]), keys, stored):
            indexed, calibrated = 0, stored
    return [stored, indexed, calibrated]


def check_capacity(stored: int, num_new: int, capacity: int) -> None:
    """Check new tokens against the room of a static cache.

    Raises:
        CapacityError: they do not fit.
    """
    if stored + num_new > capacity:
        raise CapacityError(
            f"{stored} tokens are stored and {num_new} more do not fit a static cache of "
            f"{capacity}: generate with a larger max_cache_len, or without a static cache"
        )
