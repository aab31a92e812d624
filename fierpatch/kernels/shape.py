"""How big a retrieval is: its launches, and the memory its kernels write for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from fierpatch.index import KeyIndex, RotatedIndex
from fierpatch.index.packing import TILE_SIZE
from fierpatch.kernels.constants import EXPONENTS, MANTISSAS, MAX_HEADS
from fierpatch.select import CANDIDATE_TEMPERATURE

CHANNELS_AT_ONCE = 32  # of the query, that a program rotates
GROUPS_AT_ONCE = 32  # whose centres a program multiplies with the query
_BLOCK = 2048  # tokens a program of the selection reads at once
_MAX_CHUNKS = 64
CANDIDATE_TILE = 32  # candidates that a program scores
_CANDIDATE_WEIGHTS = 16_384  # that a program of the second selection has in registers
_MAX_PROGRAMS = 528  # of the selection, four for each of 132 multiprocessors


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
        refine: candidates that are scored again, in multiples of the budget; 0 for no such.
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
    refine: int = 0

    @classmethod
    def of(
        cls,
        index: KeyIndex,
        query_size: Sequence[int],
        planes: Tensor,
        *,
        budget: int,
        per_query_head: bool,
        refine: int = 0,
    ) -> Shape:
        """The shape of a retrieval for queries ``[B, Hq, T, D]`` over an index with such planes."""
        batch_size, num_heads, num_queries, _ = query_size
        num_kv_heads, tiles = planes.shape[1:3]
        return cls(
            index=index,
            batch_size=batch_size,
            num_kv_heads=num_kv_heads,
            num_groups=num_heads // num_kv_heads,
            num_queries=num_queries,
            tiles=tiles,
            budget=budget,
            per_query_head=per_query_head,
            refine=refine,
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Looked up at every launch, so worked out once.
        sizes = (self.batch_size, self.num_kv_heads, self.num_groups, self.num_queries)
        rest = (self.tiles, self.budget, self.per_query_head, self.block, self.refine)
        return hash((self.index, *sizes, *rest))

    @cached_property
    def heads(self) -> int:
        """Query heads of one group that a program scores: 4, whose bytes fill 8 columns, or 8."""
        return 4 if self.num_groups <= 4 else MAX_HEADS.value

    @cached_property
    def head_blocks(self) -> int:
        """Programs that share the query heads of one group."""
        return triton.cdiv(self.num_groups, self.heads)

    @cached_property
    def score_rows(self) -> int:
        """KV heads times queries: ``B * H * T``."""
        return self.batch_size * self.num_kv_heads * self.num_queries

    @cached_property
    def query_tasks(self) -> int:
        """Programs that prepare one row's query for the rotated index."""
        groups = self.tiles * TILE_SIZE // self.index.group_size
        channels = triton.cdiv(self.index.head_dim, CHANNELS_AT_ONCE)
        return channels + triton.cdiv(groups, GROUPS_AT_ONCE)

    @cached_property
    def list_heads(self) -> int:
        """Query heads that share a list: G, or 1."""
        return 1 if self.per_query_head else self.num_groups

    @cached_property
    def num_lists(self) -> int:
        """Lists of tokens a batch row and query: H, or Hq."""
        return self.num_kv_heads * self.num_groups // self.list_heads

    @cached_property
    def rows(self) -> int:
        """Lists of tokens in all."""
        return self.batch_size * self.num_lists * self.num_queries

    @cached_property
    def select_block(self) -> int:
        """Tokens a program of the selection reads at once."""
        return self.block or _BLOCK

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
    def padded_length(self) -> int:
        """Tokens of a row's chunks, all of them whole."""
        return self.chunks * self.blocks_per_chunk * self.select_block

    @cached_property
    def width(self) -> int:
        """Slots of a list."""
        return min(self.budget, self.tiles * TILE_SIZE)

    @cached_property
    def first_budget(self) -> int:
        """Tokens that the first selection chooses a list: candidates, or the list itself."""
        return self.budget * max(self.refine, 1)

    @cached_property
    def temperature(self) -> float:
        """Of the first scoring's softmax."""
        return CANDIDATE_TEMPERATURE if self.refine else 1.0

    @cached_property
    def num_candidates(self) -> int:
        """Slots of a list of candidates."""
        return min(self.refine * self.budget, self.tiles * TILE_SIZE)

    @cached_property
    def refines_by_codes(self) -> bool:
        """Whether candidates are scored by codes of the index, and not by their keys."""
        return self.refine > 0 and self.index.refined_bytes_per_token > 0

    @cached_property
    def candidate_block(self) -> int:
        """Candidates that the program of the second selection reads at once: as registers allow."""
        most = _CANDIDATE_WEIGHTS // max(triton.next_power_of_2(self.list_heads), 4)
        return max(min(triton.next_power_of_2(self.num_candidates or 1), most), CANDIDATE_TILE)

    @cached_property
    def candidate_blocks(self) -> int:
        """Such blocks a list."""
        return triton.cdiv(self.num_candidates, self.candidate_block)

    @cached_property
    def candidate_tiles(self) -> int:
        """Programs that score one list's candidates, whole blocks of them."""
        return self.candidate_blocks * self.candidate_block // CANDIDATE_TILE


class Scratch:
    """The intermediate results of a retrieval; reused by every layer of one shape.

    Args:
        shape: the sizes.
        device: where.
    """

    @classmethod
    def within(cls, shape: Shape, room: Tensor) -> Scratch:
        """One whose memory is that of ``room``, uint8 of `nbytes_of` bytes."""
        scratch, start = cls(shape, torch.device("meta")), 0
        for name, like in vars(scratch).items():
            part = room[start : start + like.nbytes]
            setattr(scratch, name, part.view(like.dtype).view(like.shape))
            start += _aligned(like.nbytes)
        return scratch

    @classmethod
    def nbytes_of(cls, shape: Shape) -> int:
        """Bytes of all its tensors, each from an aligned address."""
        tensors = vars(cls(shape, torch.device("meta"))).values()
        return sum(_aligned(tensor.nbytes) for tensor in tensors)

    def __init__(self, shape: Shape, device: torch.device) -> None:
        head_dim, tokens = shape.index.head_dim, shape.tiles * TILE_SIZE
        groups = tokens // shape.index.group_size

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=device)

        # Only the rotated index has its query prepared.
        slots = shape.score_rows * shape.head_blocks * shape.heads
        slots = slots if isinstance(shape.index, RotatedIndex) else 0
        self.operand = empty(slots * 2 * head_dim, dtype=torch.int8)
        packed = slots if shape.refines_by_codes else 0
        self.packed = empty(packed * 2 * head_dim, dtype=torch.int8)
        self.total = empty(slots * triton.cdiv(head_dim, CHANNELS_AT_ONCE), dtype=torch.int32)
        self.unit = empty(slots)
        self.mean = empty(groups * slots)
        self.weight = empty(shape.score_rows, tokens, shape.num_groups, dtype=torch.int16)
        self.most = empty(shape.score_rows, shape.tiles, shape.num_groups)
        self.sum = torch.empty_like(self.most)
        counts = (shape.batch_size, shape.num_queries, shape.tiles)
        self.count = empty(*counts, dtype=torch.int32)
        self.key = empty(shape.rows, shape.padded_length, dtype=torch.int16)
        self.high = empty(shape.rows, EXPONENTS.value, dtype=torch.int32)
        self.chunk_low = empty(shape.rows, shape.chunks, MANTISSAS.value, dtype=torch.int32)
        self.chunk_over = empty(shape.rows, shape.chunks, dtype=torch.int32)
        self.plan = empty(shape.rows, 2, dtype=torch.int32)
        candidates = (shape.rows, shape.candidate_tiles, CANDIDATE_TILE)
        self.candidates = empty(shape.rows, shape.num_candidates, dtype=torch.int32)
        self.candidate_weight = empty(*candidates, shape.list_heads, dtype=torch.int16)
        self.candidate_most = empty(*candidates[:2], shape.list_heads)
        self.candidate_sum = torch.empty_like(self.candidate_most)
        # Only a program that cannot keep them in registers writes them down.
        written = candidates if shape.candidate_blocks > 1 else (0,)
        self.candidate_key = empty(*written, dtype=torch.int16)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16
