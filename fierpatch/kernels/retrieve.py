"""Choosing the tokens of a step: query transform, scores and selection, a launch each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton
from torch import Tensor

from fierpatch.index import KeyIndex, RotatedIndex
from fierpatch.index.packing import TILE_SIZE
from fierpatch.index.rotation import rotation_norm
from fierpatch.kernels.launch import Specialization, aligned
from fierpatch.kernels.query import rotate_query_kernel
from fierpatch.kernels.scores import fier_scores_kernel, rotated_scores_kernel
from fierpatch.kernels.top_k import compact_kernel, key_kernel, low_kernel

_LOG2_E = 1.4426950408889634
_OUT = 32  # channels of the query a program rotates
_GROUPS = 64  # groups a program multiplies with the query
_MAX_HEADS = 8  # query heads a program scores
_MIN_BLOCK, _MAX_BLOCK = 2048, 4096  # tokens a program of the selection reads at once
_TOKENS_PER_WARP = 512  # of them: what a warp does for its program costs as much as 100 tokens
_MAX_CHUNKS = 64
_MAX_PROGRAMS = 256  # of the selection: more would only wait for each other
_BINS = 256


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the launches of a retrieval, and the room it takes.

    Args:
        index: the key index.
        batch_size, num_kv_heads, num_groups, num_queries: B, H, G, T.
        tiles: tiles of 512 tokens that the index has room for.
        budget: tokens chosen a list.
        per_query_head: whether every query head has a list of its own.
        block: tokens a program of the selection reads at once, a multiple of 512; 0 chooses.
    """

    index: KeyIndex
    batch_size: int
    num_kv_heads: int
    num_groups: int
    num_queries: int
    tiles: int
    budget: int
    per_query_head: bool
    block: int = 0

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Looked up at every launch, so worked out once.
        sizes = (self.batch_size, self.num_kv_heads, self.num_groups, self.num_queries)
        rest = (self.tiles, self.budget, self.per_query_head, self.block)
        return hash((self.index, *sizes, *rest))

    @cached_property
    def heads(self) -> int:
        """Query heads of one group that a program scores, a power of two."""
        return min(triton.next_power_of_2(self.num_groups), _MAX_HEADS)

    @cached_property
    def head_blocks(self) -> int:
        """Programs that share the query heads of one group."""
        return triton.cdiv(self.num_groups, self.heads)

    @cached_property
    def score_rows(self) -> int:
        """KV heads times queries: ``B * H * T``."""
        return self.batch_size * self.num_kv_heads * self.num_queries

    @cached_property
    def num_lists(self) -> int:
        """Lists of tokens a batch row and query: H, or Hq."""
        return self.num_kv_heads * (self.num_groups if self.per_query_head else 1)

    @cached_property
    def rows(self) -> int:
        """Lists of tokens in all."""
        return self.batch_size * self.num_lists * self.num_queries

    @cached_property
    def select_block(self) -> int:
        """Tokens a program of the selection reads at once."""
        share = self.tiles * TILE_SIZE * self.rows * 2 // _MAX_PROGRAMS
        return self.block or (_MIN_BLOCK if share <= _MIN_BLOCK else _MAX_BLOCK)

    @cached_property
    def blocks_per_chunk(self) -> int:
        """Blocks that a program of the selection reads one after the other.

        So many that all programs run at the same time, if rows are not too many for that.
        """
        blocks = triton.cdiv(self.tiles * TILE_SIZE, self.select_block)
        most = max(min(_MAX_PROGRAMS // self.rows, _MAX_CHUNKS), 1)
        return triton.cdiv(blocks, most)

    @cached_property
    def chunks(self) -> int:
        """Programs of the selection a row."""
        return triton.cdiv(self.tiles * TILE_SIZE, self.select_block * self.blocks_per_chunk)

    @cached_property
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
        self.high = empty(shape.rows, _BINS, dtype=torch.int32)
        self.low = torch.empty_like(self.high)
        self.chunk_low = empty(shape.rows, shape.chunks, _BINS, dtype=torch.int32)
        self.chunk_over = empty(shape.rows, shape.chunks, dtype=torch.int32)
        self.plan = empty(shape.rows, 2, dtype=torch.int32)

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
    rotate_specialization(shape, query.dtype).launch(
        (tasks, shape.score_rows, shape.head_blocks),
        query, balance, rotation, centre, counters,
        scratch.operand, scratch.total, scratch.unit, scratch.mean,
        *query.stride()[:3], shape.num_kv_heads, shape.num_queries, shape.tiles, logits.factor,
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
    outputs = (scratch.logit, scratch.most, scratch.sum, scratch.count, scratch.high)
    sizes = (shape.num_kv_heads, shape.num_queries, shape.tiles)
    has_mask, has_cap = visible is not None, logits.softcap > 0
    if isinstance(shape.index, RotatedIndex):
        rotated_scores_specialization(shape, has_mask, has_cap).launch(
            grid, scratch.operand_bytes, scratch.total, scratch.unit, scratch.mean,
            state[0].view(torch.int8), state[1], counters, visible, *outputs,
            *strides, *sizes, logits.softcap,
        )  # fmt: skip
    else:
        fier_scores_specialization(shape, query.dtype, has_mask, has_cap).launch(
            grid, query, *state, counters, visible, *outputs,
            *query.stride()[:3], *strides, *sizes, logits.factor, logits.softcap,
        )  # fmt: skip


def select(
    shape: Shape,
    scratch: Scratch,
    counters: Tensor,
    *,
    sinks: int,
    recent: int,
    sink_logits: Tensor | None = None,
    has_mask: bool = False,
) -> Tensor:
    """Token indices from what `score` left: int64 ``[B, H or Hq, T, width]``.

    The same tokens as `fierpatch.select.select` chooses from scores that round to the same keys.
    """
    sink_logits = None if sink_logits is None else aligned(sink_logits)
    lists = (shape.batch_size, shape.num_lists, shape.num_queries, shape.width)
    token_indices = torch.empty(lists, dtype=torch.int64, device=scratch.key.device)
    grid = (shape.chunks, shape.rows, 1)
    sink_dtype = None if sink_logits is None else sink_logits.dtype
    make_keys, count_low, compact = select_specializations(shape, has_mask, sink_dtype)
    make_keys.launch(
        grid, scratch.logit, scratch.most, scratch.sum, sink_logits, scratch.count, counters,
        scratch.key, scratch.high, scratch.low,
        shape.num_lists, shape.num_queries, shape.tiles, sinks, recent, shape.blocks_per_chunk,
    )  # fmt: skip
    parts = (scratch.high, scratch.low, scratch.chunk_low, scratch.chunk_over, scratch.plan)
    sizes = (shape.tiles, shape.blocks_per_chunk)
    count_low.launch(grid, scratch.key, *parts, counters, shape.budget, *sizes)
    compact.launch(
        grid, scratch.key, *parts, counters, token_indices, shape.budget, shape.width, *sizes
    )
    return token_indices


@cache
def rotate_specialization(shape: Shape, dtype: torch.dtype) -> Specialization:
    """Of `rotate_query_kernel`."""
    head_dim = shape.index.head_dim
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "G": shape.num_groups,
        "HEADS": shape.heads,
        "BLOCKS": shape.head_blocks,
        "GROUP": shape.index.group_size,
        "OUT": _OUT,
        "GROUPS": _GROUPS,
        "NORM": rotation_norm(head_dim),
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
    num_warps = 4 if head_dim <= 128 else 8
    return Specialization(rotate_query_kernel, constants, num_warps=num_warps)


@cache
def rotated_scores_specialization(shape: Shape, has_mask: bool, has_cap: bool) -> Specialization:
    """Of `rotated_scores_kernel`."""
    assert isinstance(shape.index, RotatedIndex)
    head_dim = shape.index.head_dim
    channel_blocks = triton.cdiv(head_dim, _OUT)
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "G": shape.num_groups,
        "HEADS": shape.heads,
        "BLOCKS": shape.head_blocks,
        "BITS": shape.index.bits,
        "GROUP": shape.index.group_size,
        "CHANNEL_BLOCKS": channel_blocks,
        "BLOCK_C": triton.next_power_of_2(channel_blocks),
        "LISTS": shape.num_lists // shape.num_kv_heads,
        "HAS_MASK": has_mask,
        "HAS_CAP": has_cap,
    }
    return Specialization(rotated_scores_kernel, constants, num_warps=2, num_stages=1)


@cache
def fier_scores_specialization(
    shape: Shape, dtype: torch.dtype, has_mask: bool, has_cap: bool
) -> Specialization:
    """Of `fier_scores_kernel`."""
    head_dim = shape.index.head_dim
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "G": shape.num_groups,
        "HEADS": _MAX_HEADS,  # the matrix units want 8 columns
        "GROUP": shape.index.group_size,
        "LISTS": shape.num_lists // shape.num_kv_heads,
        "HAS_MASK": has_mask,
        "HAS_CAP": has_cap,
    }
    num_warps = 2 if head_dim <= 128 else 4
    return Specialization(fier_scores_kernel, constants, num_warps=num_warps, num_stages=1)


@cache
def select_specializations(
    shape: Shape, has_mask: bool, sink_dtype: torch.dtype | None
) -> tuple[Specialization, Specialization, Specialization]:
    """Of `key_kernel`, `low_kernel` and `compact_kernel`.

    What grows with the context is no constant, or is one in few steps: a growing cache would
    otherwise stop to compile.
    """
    heads = 1 if shape.per_query_head else shape.num_groups
    block = {"BLOCK": shape.select_block}
    keys = {
        "G": shape.num_groups,
        "HEADS": heads,
        "BLOCK_H": triton.next_power_of_2(heads),
        **block,
        "BLOCK_TILES": 256,
        "HAS_MASK": has_mask,
        "HAS_SINK": sink_dtype is not None,
    }
    chunks = {"CHUNKS": max(triton.next_power_of_2(shape.chunks), 8), "BLOCK_W": 1024}
    num_warps = max(shape.select_block // _TOKENS_PER_WARP, 1)
    return (
        Specialization(key_kernel, keys, num_warps=num_warps),
        Specialization(low_kernel, block, num_warps=num_warps),
        Specialization(compact_kernel, block | chunks, num_warps=num_warps),
    )
