"""What the ops return without the numbers, for a compiler that traces them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fierpatch.index.packing import TILE_SIZE
from fierpatch.rows import split


def retrieve_fake(
    query: Tensor,
    state: list[Tensor],
    counters: Tensor,
    visible: Tensor | None,
    sink_logits: Tensor | None,
    index: str,
    bits: int,
    group_size: int,
    seed: int,
    refine_bits: int,
    budget: int,
    sinks: int,
    recent: int,
    per_query_head: bool,
    scale: float,
    softcap: float,
    *rest: Any,
) -> Tensor:
    """What `_retrieve` returns, without the numbers."""
    num_lists = query.shape[1] if per_query_head else state[0].shape[1]
    width = min(budget, state[0].shape[2] * TILE_SIZE)
    return query.new_empty((query.shape[0], num_lists, query.shape[2], width), dtype=torch.int64)


def attend_fake(query: Tensor, rows: list[Tensor], *rest: Any) -> Tensor:
    """What attention returns, ``[B, T, Hq, Dv]``, without the numbers."""
    batch_size, num_query_heads, num_queries, head_dim = query.shape
    values = split(rows, head_dim)[1]
    return query.new_empty((batch_size, num_queries, num_query_heads, values.shape[3]))


def attend_hot_fake(query: Tensor, paired: Tensor, *rest: Any) -> Tensor:
    """What attention by way of a hot set returns, without the numbers."""
    return attend_fake(query, [paired])
