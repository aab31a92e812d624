"""The settings of a patch as the library ops take them."""

from __future__ import annotations

from typing import Any

from fierpatch.config import FierConfig
from fierpatch.index import KeyIndex
from fierpatch.ops.library import named_index  # and registers torch.ops.fierpatch
from fierpatch.query_estimate import QueryEstimate


def index_arguments(config: FierConfig) -> tuple[str, int, int, int, int]:
    """Name, bits, group_size, seed and refine_bits of the index, as the library ops take them."""
    return config.index, config.bits, config.index_group_size, config.seed, config.code_bits


def ahead_arguments(config: FierConfig, estimate: QueryEstimate) -> tuple[Any, ...]:
    """The settings of `Operators.place_ahead`, as the library ops take them.

    The usual scale of the logits, without a cap: an estimate needs no more.
    """
    return (
        *index_arguments(config), config.budget, config.sinks, config.recent,
        config.per_query_head, estimate.size[3] ** -0.5, config.refine,
    )  # fmt: skip


def layer_index(config: FierConfig, head_dim: int) -> KeyIndex:
    """The index that the settings ask for, for keys of `head_dim` channels."""
    return named_index(*index_arguments(config), head_dim)
