"""What the tests of FlexAttention draw: layouts of the query axis, lists of tokens, dense masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from fierpatch.flex import MaskMod, QueryLayout
from strategies import seeds

# On and off every size of block, tile and word.
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200, 256, 300)


@dataclass(frozen=True)
class Case:
    """Sizes of one attention problem, seen by FlexAttention folded or apart."""

    batch_size: int
    num_kv_heads: int
    num_groups: int
    num_queries: int
    length: int
    is_folded: bool
    seed: int
    device: str = "cpu"

    @property
    def num_query_heads(self) -> int:
        return self.num_kv_heads * self.num_groups

    @property
    def layout(self) -> QueryLayout:
        folded = self.num_groups if self.is_folded else 1
        return QueryLayout(self.num_query_heads, self.num_queries, folded)

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def cells(self, mask_mod: MaskMod) -> Tensor:
        """Every cell of the mask, as bool ``[B, Hq, T, S]`` however the queries are laid out."""
        layout = self.layout
        sizes = (self.batch_size, layout.num_heads, layout.num_rows, self.length)
        allowed = create_mask(mask_mod, *sizes, device=self.device)
        allowed = allowed.expand(sizes).unflatten(2, (layout.num_folded, -1))
        return allowed.flatten(1, 2)


@st.composite
def cases(draw: st.DrawFn, *, is_folded: bool | None = None, longest: int = LENGTHS[-1]) -> Case:
    length = draw(st.sampled_from([length for length in LENGTHS if length <= longest]))
    return Case(
        batch_size=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 3)),
        num_groups=draw(st.sampled_from((1, 2, 3, 5, 7, 8))),
        num_queries=draw(st.integers(1, min(8, length))),
        length=length,
        is_folded=draw(st.booleans()) if is_folded is None else is_folded,
        seed=draw(seeds()),
    )


def random_lists(
    batch_size: int,
    num_lists: int,
    num_queries: int,
    length: int,
    width: int,
    generator: torch.Generator,
) -> Tensor:
    """Lists as selection gives them: ascending, none to all of the width used, then -1."""
    lists = torch.full((batch_size, num_lists, num_queries, width), -1)
    for each in lists.flatten(0, 2):
        count = int(torch.randint(min(width, length) + 1, (), generator=generator))
        each[:count] = torch.randperm(length, generator=generator)[:count].sort().values
    return lists


def lists_as_cells(lists: Tensor, num_query_heads: int, length: int) -> Tensor:
    """The tokens of each query head's list as bool ``[B, Hq, T, S]``."""
    places = torch.where(lists >= 0, lists, length)
    cells = torch.zeros(*lists.shape[:3], length + 1, dtype=torch.bool).scatter_(3, places, True)
    return cells[..., :length].repeat_interleave(num_query_heads // lists.shape[1], 1)


def visited(block_mask: BlockMask) -> Tensor:
    """The cells of all blocks that a kernel visits, as bool ``[B, H, queries, keys]``."""
    blocks = block_mask.to_dense().bool()
    query_size, key_size = block_mask.BLOCK_SIZE
    cells = blocks.repeat_interleave(query_size, 2).repeat_interleave(key_size, 3)
    num_queries, num_keys = block_mask.seq_lengths
    return cells[:, :, :num_queries, :num_keys]
