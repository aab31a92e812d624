"""Choosing the tokens of a step: query transform, scores and selection, in five launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fierpatch.index import KeyIndex, RotatedIndex
from fierpatch.index.packing import TILE_SIZE
from fierpatch.index.rotation import rotation_norm
from fierpatch.kernels.launch import Constants, Launcher, aligned
from fierpatch.kernels.query import rotate_query_kernel
from fierpatch.kernels.scores import fier_scores_kernel, rotated_scores_kernel
from fierpatch.kernels.top_k import compact_kernel, low_histogram_kernel, priority_kernel

_LOG2_E = 1.4426950408889634
_OUT = 32  # channels of the query a program rotates
_GROUPS = 64  # groups a program multiplies with the query
_MAX_HEADS = 8  # query heads a program scores
_BLOCK = 4096  # tokens a program of the selection reads at once
_MAX_CHUNKS = 64
SCORE_WARPS = 2

_rotate_query = Launcher(rotate_query_kernel)
_rotated_scores = Launcher(rotated_scores_kernel)
_fier_scores = Launcher(fier_scores_kernel)
_priority = Launcher(priority_kernel)
_low_histogram = Launcher(low_histogram_kernel)
_compact = Launcher(compact_kernel)


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the launches of a retrieval, and the room it takes.

    Args:
        index: the key index.
        batch_size, num_kv_heads, num_groups, num_queries: B, H, G, T.
        tiles: tiles of 512 tokens that the index has room for.
        budget: tokens chosen a list.
        per_query_head: whether every query head has a list of its own.
        block: tokens a program of the selection reads at once; a multiple of 512.
    """

    index: KeyIndex
    batch_size: int
    num_kv_heads: int
    num_groups: int
    num_queries: int
    tiles: int
    budget: int
    per_query_head: bool
    block: int = _BLOCK

    @property
    def heads(self) -> int:
        """Query heads of one group that a program scores, a power of two."""
        return min(triton.next_power_of_2(self.num_groups), _MAX_HEADS)

    @property
    def head_blocks(self) -> int:
        """Programs that share the query heads of one group."""
        return triton.cdiv(self.num_groups, self.heads)

    @property
    def score_rows(self) -> int:
        """KV heads times queries: ``B * H * T``."""
        return self.batch_size * self.num_kv_heads * self.num_queries

    @property
    def num_lists(self) -> int:
        """Lists of tokens a batch row and query: H, or Hq."""
        return self.num_kv_heads * (self.num_groups if self.per_query_head else 1)

    @property
    def rows(self) -> int:
        """Lists of tokens in all."""
        return self.batch_size * self.num_lists * self.num_queries

    @property
    def blocks_per_chunk(self) -> int:
        """Blocks that a program of the selection reads one after the other."""
        return triton.cdiv(self.tiles * TILE_SIZE, self.block * _MAX_CHUNKS)

    @property
    def chunks(self) -> int:
        """Programs of the selection a row."""
        return triton.cdiv(self.tiles * TILE_SIZE, self.block * self.blocks_per_chunk)

    @property
    def width(self) -> int:
        """Slots of a list."""
        return min(self.budget, self.tiles * TILE_SIZE)


class Scratch:
    """The intermediate results of a retrieval; reused by every layer of one shape.

    Args:
        shape: the sizes.
        device: where.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        head_dim, slots = shape.index.head_dim, shape.score_rows * shape.head_blocks * shape.heads
        tokens = shape.tiles * TILE_SIZE
        groups = tokens // shape.index.group_size

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=device)

        is_rotated = isinstance(shape.index, RotatedIndex)
        self.operand = empty(slots * 4 * head_dim if is_rotated else 0, dtype=torch.int16)
        self.operand_bytes = self.operand.view(torch.int8)
        self.total = empty(slots * triton.cdiv(head_dim, _OUT), dtype=torch.int32)
        self.unit = empty(slots)
        self.mean = empty(groups * slots if is_rotated else 0)
        self.logit = empty(shape.score_rows, tokens, shape.num_groups)
        self.most = empty(shape.score_rows, shape.tiles, shape.num_groups)
        self.sum = torch.empty_like(self.most)
        counts = (shape.batch_size, shape.num_queries, shape.tiles)
        self.count = empty(*counts, dtype=torch.int32)
        self.key = empty(shape.rows, tokens, dtype=torch.int16)
        self.histogram = empty(shape.rows, shape.chunks, 256, dtype=torch.int32)
        self.low_histogram = torch.empty_like(self.histogram)
        chunks = triton.next_power_of_2(shape.chunks)
        self.plan = empty(shape.rows, 3 * chunks + 8, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in vars(self).values()) - (
            self.operand_bytes.numel()
        )


@dataclass(frozen=True)
class Logits:
    """How scores become logits.

    Args:
        scale: multiplies ``q . k``.
        softcap: where positive, caps the logits as in Gemma 2.
    """

    scale: float
    softcap: float = 0.0

    @property
    def factor(self) -> float:
        """What kernels multiply scores by: to units of log2, or of the cap."""
        return self.scale / self.softcap if self.softcap > 0 else self.scale * _LOG2_E


def score(
    shape: Shape,
    scratch: Scratch,
    query: Tensor,
    state: list[Tensor],
    counters: Tensor,
    logits: Logits,
    visible: Tensor | None = None,
) -> None:
    """Fill ``scratch.logit`` and the softmax statistics of its tiles.

    Args:
        query: ``[B, Hq, T, D]``, last dimension contiguous.
        state: the index's tensors.
        counters: int64 ``[4]``; the first is the number of tokens stored.
        visible: bool ``[B or 1, 1, T, S]`` of any strides; None means causal.
    """
    query = aligned(query if query.stride(3) == 1 else query.contiguous())
    rotate(shape, scratch, query, state, counters, logits)
    score_tiles(shape, scratch, query, state, counters, logits, visible)


def rotate(
    shape: Shape,
    scratch: Scratch,
    query: Tensor,
    state: list[Tensor],
    counters: Tensor,
    logits: Logits,
) -> None:
    """The query as the rotated index scores it; nothing to do for the others."""
    if not isinstance(shape.index, RotatedIndex):
        return
    _, _, centre, balance, rotation = state
    groups = shape.tiles * TILE_SIZE // shape.index.group_size
    tasks = triton.cdiv(shape.index.head_dim, _OUT) + triton.cdiv(groups, _GROUPS)
    _rotate_query(
        (tasks, shape.score_rows, shape.head_blocks),
        query, balance, rotation, centre, counters,
        scratch.operand, scratch.total, scratch.unit, scratch.mean,
        *query.stride()[:3], shape.num_kv_heads, shape.num_queries, shape.tiles, logits.factor,
        constants=_query_constants(shape), num_warps=4 if shape.index.head_dim <= 128 else 8,
    )  # fmt: skip


def score_tiles(
    shape: Shape,
    scratch: Scratch,
    query: Tensor,
    state: list[Tensor],
    counters: Tensor,
    logits: Logits,
    visible: Tensor | None,
) -> None:
    """The scores of every tile, after `rotate`."""
    strides = (0, 0)
    if visible is not None:
        visible = aligned(visible if visible.stride(3) == 1 else visible.contiguous())
        strides = (visible.stride(0) if visible.shape[0] > 1 else 0, visible.stride(2))
    grid = (shape.tiles, shape.score_rows, shape.head_blocks)
    outputs = (scratch.logit, scratch.most, scratch.sum, scratch.count)
    sizes = (shape.num_kv_heads, shape.num_queries, shape.tiles)
    constants = _score_constants(shape, visible is not None, logits.softcap > 0)
    num_warps = SCORE_WARPS or (2 if shape.index.head_dim <= 128 else 4)
    if isinstance(shape.index, RotatedIndex):
        _rotated_scores(
            grid, scratch.operand_bytes, scratch.total, scratch.unit, scratch.mean,
            state[0].view(torch.int8), state[1], counters, visible, *outputs,
            *strides, *sizes, logits.softcap,
            constants=constants, num_warps=num_warps, num_stages=1,
        )  # fmt: skip
    else:
        _fier_scores(
            grid, query, *state, counters, visible, *outputs,
            *query.stride()[:3], *strides, *sizes, logits.factor, logits.softcap,
            constants=constants, num_warps=num_warps, num_stages=1,
        )  # fmt: skip


def select(
    shape: Shape,
    scratch: Scratch,
    counters: Tensor,
    arrivals: Tensor,
    *,
    sinks: int,
    recent: int,
    sink_logits: Tensor | None = None,
    has_mask: bool = False,
) -> Tensor:
    """Token indices from what `score` left: int64 ``[B, H or Hq, T, width]``, as the reference's.

    arrivals is int32 zeros, one a row at least, and left as such.
    """
    grid = (shape.chunks, shape.rows, 1)
    _priority(
        grid, scratch.logit, scratch.most, scratch.sum, sink_logits, scratch.count, counters,
        scratch.key, scratch.histogram, scratch.plan, arrivals,
        shape.num_lists, shape.num_queries, shape.tiles, sinks, recent, shape.budget,
        constants=_priority_constants(shape, has_mask, sink_logits is not None), num_warps=8,
    )  # fmt: skip
    return pick(shape, scratch, counters, arrivals)


def pick(shape: Shape, scratch: Scratch, counters: Tensor, arrivals: Tensor) -> Tensor:
    """The second half of `select`: the largest keys."""
    grid = (shape.chunks, shape.rows, 1)
    _low_histogram(
        grid, scratch.key, scratch.low_histogram, counters, scratch.plan, arrivals,
        shape.budget, shape.tiles,
        constants=_pick_constants(shape), num_warps=8,
    )  # fmt: skip
    lists = (shape.batch_size, shape.num_lists, shape.num_queries, shape.width)
    token_indices = torch.empty(lists, dtype=torch.int64, device=scratch.key.device)
    _compact(
        grid, scratch.key, counters, scratch.plan, token_indices, shape.width, shape.tiles,
        constants=(*_pick_constants(shape), ("BLOCK_W", 1024)), num_warps=8,
    )  # fmt: skip
    return token_indices


@cache
def _query_constants(shape: Shape) -> Constants:
    head_dim = shape.index.head_dim
    return (
        ("D", head_dim),
        ("BLOCK_D", triton.next_power_of_2(head_dim)),
        ("G", shape.num_groups),
        ("HEADS", shape.heads),
        ("BLOCKS", shape.head_blocks),
        ("GROUP", shape.index.group_size),
        ("OUT", _OUT),
        ("GROUPS", _GROUPS),
        ("NORM", rotation_norm(head_dim)),
    )


@cache
def _score_constants(shape: Shape, has_mask: bool, has_cap: bool) -> Constants:
    head_dim = shape.index.head_dim
    channel_blocks = triton.cdiv(head_dim, _OUT)
    sizes: dict[str, Any] = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "G": shape.num_groups,
    }
    if isinstance(shape.index, RotatedIndex):
        sizes |= {
            "HEADS": shape.heads,
            "BLOCKS": shape.head_blocks,
            "BITS": shape.index.bits,
            "GROUP": shape.index.group_size,
            "CHANNEL_BLOCKS": channel_blocks,
            "BLOCK_C": triton.next_power_of_2(channel_blocks),
        }
    else:
        # The matrix units want 8 columns.
        sizes |= {"HEADS": _MAX_HEADS, "GROUP": shape.index.group_size}
    return (*sizes.items(), ("HAS_MASK", has_mask), ("HAS_CAP", has_cap))


@cache
def _priority_constants(shape: Shape, has_mask: bool, has_sink: bool) -> Constants:
    heads = 1 if shape.per_query_head else shape.num_groups
    return (
        ("G", shape.num_groups),
        ("HEADS", heads),
        ("BLOCK_H", triton.next_power_of_2(heads)),
        ("BLOCK", shape.block),
        ("BLOCKS", shape.blocks_per_chunk),
        ("CHUNKS", triton.next_power_of_2(shape.chunks)),
        ("BLOCK_TILES", min(triton.next_power_of_2(shape.tiles), 256)),
        ("HAS_MASK", has_mask),
        ("HAS_SINK", has_sink),
    )


@cache
def _pick_constants(shape: Shape) -> Constants:
    return (
        ("BLOCK", shape.block),
        ("BLOCKS", shape.blocks_per_chunk),
        ("CHUNKS", triton.next_power_of_2(shape.chunks)),
    )
