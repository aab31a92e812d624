"""mask_mods by name: which cells of attention are allowed, one token at a time.

Each factory returns a function of ``b, h, q_idx, kv_idx``, as FlexAttention calls it. Combine them
with ``and_masks`` and ``or_masks`` of `torch.nn.attention.flex_attention`. What changes from call
to call is best a tensor: a number is part of the compiled kernel, and another compiles it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fierpatch.errors import ShapeError

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

WORD_SIZE = 32  # tokens a word of a bitmap, which is int32


@dataclass(frozen=True)
class QueryLayout:
    """What ``h`` and ``q_idx`` stand for: heads and queries, or groups folded into the queries.

    A prefill passes ``[B, Hq, T, D]``. Decode passes ``[B, H, G * T, D]``, the query heads of a KV
    head one after the other in the query length, so that one program serves them all.

    Args:
        num_query_heads: Hq.
        num_queries: T.
        num_folded: query heads in one row of heads: G where they are folded, else 1.

    Raises:
        ShapeError: the query heads do not divide into such rows.
    """

    num_query_heads: int
    num_queries: int
    num_folded: int = 1

    def __post_init__(self) -> None:
        if self.num_folded < 1 or self.num_query_heads % self.num_folded:
            raise ShapeError(
                f"{self.num_query_heads} query heads do not fold by {self.num_folded}: want the "
                "query heads of a KV head, or 1 to leave them apart"
            )

    @property
    def num_rows(self) -> int:
        """The query length that FlexAttention sees."""
        return self.num_folded * self.num_queries

    @property
    def num_heads(self) -> int:
        """The heads that FlexAttention sees."""
        return self.num_query_heads // self.num_folded

    def query(self, q_idx: Tensor) -> Tensor:
        """Which of the T queries."""
        return q_idx if self.num_folded == 1 else q_idx % self.num_queries

    def list_of(self, num_lists: int, h: Tensor, q_idx: Tensor) -> Tensor:
        """Which of so many lists, each shared by as many neighbouring query heads.

        Raises:
            ShapeError: the query heads do not share them evenly.
        """
        if num_lists < 1 or self.num_query_heads % num_lists:
            raise ShapeError(
                f"{self.num_query_heads} query heads do not share {num_lists} lists: want a list a "
                "KV head, a list a query head, or one for all"
            )
        if num_lists == self.num_heads:
            return h
        head = h if self.num_folded == 1 else h * self.num_folded + q_idx // self.num_queries
        return head // (self.num_query_heads // num_lists)


def causal_mask_mod(layout: QueryLayout, *, offset: int | Tensor = 0) -> MaskMod:
    """Every query sees the tokens up to its own.

    Args:
        layout: what the query axis holds.
        offset: the position of the first query, an integer or an integer tensor without axes.
    """

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= layout.query(q_idx) + offset

    return causal


def padding_mask_mod(is_token: Tensor) -> MaskMod:
    """No query sees padding.

    Args:
        is_token: bool ``[B, S]``, False for padding, on either side or anywhere.
    """
    _check_axes("is_token", is_token, "[B, S]", 2)

    def not_padding(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return is_token[b, kv_idx]

    return not_padding


def sinks_and_recent_mask_mod(
    layout: QueryLayout,
    *,
    sinks: int,
    recent: int,
    offset: int | Tensor = 0,
    first: Tensor | None = None,
) -> MaskMod:
    """The first tokens and those up to `recent` back (StreamingLLM, arXiv 2309.17453).

    It allows what comes after the query too: combine it with `causal_mask_mod`, and with
    `padding_mask_mod` where there is any.

    Args:
        layout: what the query axis holds.
        sinks: tokens at the start of each row.
        recent: tokens up to and with the query's own.
        offset: the position of the first query, an integer or an integer tensor without axes.
        first: integers ``[B]``, where each row starts behind its left padding; None means at 0.
    """
    if first is not None:
        _check_axes("first", first, "[B]", 1)

    def sinks_and_recent(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        stop = sinks if first is None else first[b] + sinks
        return (kv_idx < stop) | (kv_idx > layout.query(q_idx) + offset - recent)

    return sinks_and_recent


def selected_mask_mod(layout: QueryLayout, words: Tensor) -> MaskMod:
    """Every query sees the tokens of its list.

    Args:
        layout: what the query axis holds.
        words: int32 ``[B, L, T, ceil(S / 32)]``, bit i of word w for token ``32 w + i``, as
            `SelectionMask` keeps them; L is H or Hq.
    """
    _check_axes("words", words, "[B, L, T, W]", 4)
    num_lists = words.shape[1]

    def selected(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        list_ = layout.list_of(num_lists, h, q_idx)
        word = words[b, list_, layout.query(q_idx), kv_idx // WORD_SIZE]
        return ((word >> (kv_idx % WORD_SIZE)) & 1) != 0

    return selected


def selected_blocks_mask_mod(
    layout: QueryLayout, is_chosen: Tensor, *, block_size: tuple[int, int]
) -> MaskMod:
    """Every query sees the blocks chosen for its own block of queries.

    Args:
        layout: what the query axis holds.
        is_chosen: bool ``[B, L, query blocks, key blocks]``; L is H or Hq.
        block_size: queries and keys of a block.
    """
    _check_axes("is_chosen", is_chosen, "[B, L, query blocks, key blocks]", 4)
    num_lists = is_chosen.shape[1]
    query_size, key_size = block_size

    def selected_blocks(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        list_ = layout.list_of(num_lists, h, q_idx)
        return is_chosen[b, list_, layout.query(q_idx) // query_size, kv_idx // key_size]

    return selected_blocks


def _check_axes(name: str, tensor: Tensor, axes: str, count: int) -> None:
    if tensor.ndim != count:
        raise ShapeError(f"{name} of shape {tuple(tensor.shape)} has the wrong axes: want {axes}")
