"""A block mask over selected tokens, kept as bits and blocks that change in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from fierpatch.errors import ShapeError
from fierpatch.flex.block_mask import check_block_size, decode_block_mask
from fierpatch.flex.limits import can_fuse
from fierpatch.flex.masks import WORD_SIZE, MaskMod, QueryLayout, selected_mask_mod

# Hidden from the compiler on CPUs, see `can_fuse`. Nothing is read by the host, so that a CUDA
# graph can replay it.
_LIBRARY = torch.library.Library("fierpatch", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_LIBRARY.define(
    "flex_select_(Tensor token_indices, Tensor(a!) words, Tensor(b!) num_blocks, "
    "Tensor(c!) block_indices, int block_size, bool is_ascending) -> ()",
    tags=_TAGS,
)
_LIBRARY.define(
    "flex_select(Tensor token_indices, int num_heads, int length, int block_size, "
    "bool is_ascending) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@dataclass(frozen=True)
class SelectionMask:
    """A block mask over selected tokens, whose tensors change in place from step to step.

    Shapes and addresses stay, so a new selection compiles nothing and fits a captured graph.

    Attributes:
        words: int32 ``[B, L, T, ceil(S / 32)]``, the selected tokens of each list as bits.
        num_blocks: int32 ``[B, heads, 1]``, blocks that hold any of them, all lists and queries of
            a head together.
        block_indices: int32 ``[B, heads, 1, ceil(S / block_size)]``: these blocks, ascending; what
            follows them means nothing.
        layout: what the query axis holds; its heads are those of FlexAttention.
        length: S.
        block_size: keys of a block.

    Example::

        layout = QueryLayout(num_query_heads=32, num_queries=1, num_folded=4)
        mask = SelectionMask.empty(layout, batch_size=1, num_lists=8, length=131072)
        mask.update(token_indices)  # at each step
        flex_attention(query.view(1, 8, 4, 128), keys, values, block_mask=mask.block_mask)
    """

    words: Tensor
    num_blocks: Tensor
    block_indices: Tensor
    layout: QueryLayout
    length: int
    block_size: int = 16

    @classmethod
    def empty(
        cls,
        layout: QueryLayout,
        *,
        batch_size: int,
        num_lists: int,
        length: int,
        block_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> SelectionMask:
        """A mask that allows nothing yet.

        Args:
            layout: what the query axis holds.
            batch_size: B.
            num_lists: L, a multiple of ``layout.num_heads``.
            length: S.
            block_size: keys of a block, one of `BLOCK_SIZES`.
            device: where the tensors are made.

        Raises:
            ConfigError: no kernel takes such blocks.
        """
        check_block_size(block_size)
        shapes = _shapes(batch_size, num_lists, layout, length, block_size)
        words, num_blocks, block_indices = (
            torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes
        )
        return cls(words, num_blocks, block_indices, layout, length, block_size)

    @classmethod
    def of(
        cls,
        layout: QueryLayout,
        token_indices: Tensor,
        *,
        length: int,
        block_size: int = 16,
        is_ascending: bool = False,
    ) -> SelectionMask:
        """A mask of this selection; see `empty` and `update`. Fit for a compiled function."""
        check_block_size(block_size)
        _check_lists(layout, token_indices)
        select = _select if can_fuse(token_indices) else torch.ops.fierpatch.flex_select.default
        words, num_blocks, block_indices = select(
            token_indices, layout.num_heads, length, block_size, is_ascending
        )
        return cls(words, num_blocks, block_indices, layout, length, block_size)

    def update(self, token_indices: Tensor, *, is_ascending: bool = False) -> None:
        """Allow these tokens and no others, in work that grows with their number alone.

        Apart from clearing the bits, one for each token there is.

        Args:
            token_indices: integers ``[B, L, T, K]``, distinct within a list and below S; -1 marks
                an unused slot.
            is_ascending: every list is in ascending order with its unused slots at the end, as
                `select_tokens` gives them, which spares sorting.

        Raises:
            ShapeError: they do not fit the mask.
        """
        _check_lists(self.layout, token_indices)
        if token_indices.shape[:3] != self.words.shape[:3]:
            raise ShapeError(
                f"token_indices of shape {tuple(token_indices.shape)} do not fit a mask of "
                f"{tuple(self.words.shape[:3])} batch rows, lists and queries"
            )
        is_fused = can_fuse(token_indices)
        select = _select_in_place if is_fused else torch.ops.fierpatch.flex_select_.default
        select(
            token_indices,
            self.words,
            self.num_blocks,
            self.block_indices,
            self.block_size,
            is_ascending,
        )

    @property
    def mask_mod(self) -> MaskMod:
        """The mask of every cell."""
        return selected_mask_mod(self.layout, self.words)

    @property
    def block_mask(self) -> BlockMask:
        """What FlexAttention takes; it shares the tensors, so an update changes it too."""
        return decode_block_mask(
            self.num_blocks,
            self.block_indices,
            self.mask_mod,
            seq_lengths=(self.layout.num_rows, self.length),
            block_size=self.block_size,
        )


def _shapes(
    batch_size: int, num_lists: int, layout: QueryLayout, length: int, block_size: int
) -> tuple[tuple[int, ...], ...]:
    """Of the words, the numbers of blocks and the blocks."""
    num_words, num_slots = -(-length // WORD_SIZE), -(-length // block_size)
    lead = (batch_size, layout.num_heads, 1)
    return (batch_size, num_lists, layout.num_queries, num_words), lead, (*lead, num_slots)


def _check_lists(layout: QueryLayout, token_indices: Tensor) -> None:
    fits = token_indices.ndim == 4 and token_indices.shape[2] == layout.num_queries
    if not fits or token_indices.shape[1] % layout.num_heads:
        raise ShapeError(
            f"token_indices of shape {tuple(token_indices.shape)} do not fit {layout.num_heads} "
            f"heads and {layout.num_queries} queries: want [B, a multiple of {layout.num_heads}, "
            f"{layout.num_queries}, K]"
        )


def _select_in_place(
    token_indices: Tensor,
    words: Tensor,
    num_blocks: Tensor,
    block_indices: Tensor,
    block_size: int,
    is_ascending: bool,
) -> None:
    """See `SelectionMask.update`."""
    is_used = token_indices >= 0
    tokens = token_indices.long()
    bit = torch.ones_like(tokens, dtype=torch.int32) << (tokens % WORD_SIZE).int()
    # To 0, as no index is below -1. Were it said by a constant, a mask_mod in the same graph would
    # be compiled to read that and not the words: Inductor inlines a constant into a graph within,
    # which does not know that it is written to later (torch 2.11 to 2.13).
    words.copy_(tokens[..., :1] < -1)
    # The bits of a word are distinct, so that their sum is their union.
    words.scatter_add_(3, tokens.clamp_min(0) // WORD_SIZE, bit.masked_fill_(~is_used, 0))

    num_lists = token_indices.shape[1] // num_blocks.shape[1] * token_indices.shape[2]
    blocks = (tokens // block_size).unflatten(1, (num_blocks.shape[1], -1)).flatten(2)
    is_used = is_used.unflatten(1, (num_blocks.shape[1], -1)).flatten(2)  # [B, H, lists * T * K]
    # An unused slot repeats the last block, which is where its place then is.
    last = blocks.amax(-1, keepdim=True)
    blocks = torch.where(is_used, blocks, last).clamp_min_(0)
    if num_lists > 1 or not is_ascending:
        blocks = blocks.sort(-1).values
    is_first = torch.nn.functional.pad(blocks[..., 1:] != blocks[..., :-1], (1, 0), value=True)
    place = is_first.cumsum(-1) - 1
    block_indices.scatter_(3, place[:, :, None], blocks[:, :, None].int())
    num_blocks.copy_(torch.where(last >= 0, place[..., -1:] + 1, 0))


def _select(
    token_indices: Tensor, num_heads: int, length: int, block_size: int, is_ascending: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors of a `SelectionMask`: words, numbers of blocks, blocks."""
    made = _select_fake(token_indices, num_heads, length, block_size, is_ascending)
    made[2].zero_()  # where a kernel may read past the last block
    _select_in_place(token_indices, *made, block_size, is_ascending)
    return made


def _select_fake(
    token_indices: Tensor, num_heads: int, length: int, block_size: int, is_ascending: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_select` returns, without the numbers."""
    batch_size, num_lists, num_queries, _ = token_indices.shape
    layout = QueryLayout(num_heads, num_queries)
    words, num_blocks, block_indices = (
        token_indices.new_empty(shape, dtype=torch.int32)
        for shape in _shapes(batch_size, num_lists, layout, length, block_size)
    )
    return words, num_blocks, block_indices


_LIBRARY.impl("flex_select_", _select_in_place, "CompositeExplicitAutograd")
_LIBRARY.impl("flex_select", _select, "CompositeExplicitAutograd")
torch.library.register_fake("fierpatch::flex_select_", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::flex_select", _select_fake, lib=_LIBRARY)
