"""The library ops over Triton kernels, for compiled models: no length is read on the host.

Eager models call the kernels as they are, see `fierpatch.ops.kernel_operators`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fierpatch.hot_set import HotSet
from fierpatch.kernels import append as appending
from fierpatch.kernels import attention, retrieve
from fierpatch.kernels.ahead import await_fetched, await_placed, fetch_ahead, place_ahead
from fierpatch.kernels.logits import Logits
from fierpatch.kernels.shape import Scratch, Shape
from fierpatch.ops.fakes import attend_fake, attend_hot_fake, retrieve_fake
from fierpatch.ops.library import named_index
from fierpatch.query_estimate import QueryEstimate
from fierpatch.rows import split

_LIBRARY = torch.library.Library("fierpatch", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_INDEX = "str index, int bits, int group_size, int seed, int refine_bits"
_LIBRARY.define(
    "triton_append(Tensor key, Tensor value, Tensor(a!)[] rows, "
    f"Tensor(b!)[] state, Tensor(c!) counters, bool is_prompt, {_INDEX}) -> ()",
    tags=_TAGS,
)
_LIBRARY.define(
    "triton_retrieve(Tensor query, Tensor[] state, Tensor counters, "
    f"Tensor? visible, Tensor? sink_logits, {_INDEX}, int budget, int sinks, int recent, "
    "bool per_query_head, float scale, float softcap, int refine, Tensor? keys) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "triton_attend(Tensor query, Tensor[] rows, Tensor token_indices, "
    "Tensor counters, Tensor(a!) arrivals, Tensor? sink_logits, float scale, float softcap) "
    "-> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "triton_attend_hot(Tensor query, Tensor paired, Tensor(a!)[] hot, Tensor token_indices, "
    "Tensor counters, Tensor(b!) arrivals, Tensor? sink_logits, float scale, float softcap) "
    "-> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    # Of these four ops' arguments some are named as changed to keep the compiler from putting off
    # a start, or from waiting at once for what runs beside: who reads or changes them comes after.
    "triton_place_ahead(Tensor source, Tensor? weight, Tensor? bias, Tensor? rotation, "
    "Tensor(a!)[] hot, Tensor[] state, Tensor(b!) counters, Tensor(c!)? before, "
    f"{_INDEX}, int budget, int sinks, int recent, bool per_query_head, float scale, int refine) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "triton_fetch_ahead(Tensor paired, Tensor(a!)[] hot, Tensor chosen, Tensor placed, "
    "Tensor length, Tensor(b!)? before) -> ()",
    tags=_TAGS,
)
_LIBRARY.define(
    "triton_await_placed(Tensor(a!) counters, Tensor[] kept, Tensor after) -> ()", tags=_TAGS
)
_LIBRARY.define(
    "triton_await_fetched(Tensor(a!) tally, Tensor[] kept, Tensor(b!) after) -> ()", tags=_TAGS
)
_LIBRARY.define(
    "triton_attend_all(Tensor query, Tensor[] rows, Tensor counters, "
    "Tensor(a!) arrivals, Tensor? visible, Tensor? sink_logits, float scale, float softcap) "
    "-> Tensor",
    tags=_TAGS,
)


def _append(
    key: Tensor,
    value: Tensor,
    rows: list[Tensor],
    state: list[Tensor],
    counters: Tensor,
    is_prompt: bool,
    index: str,
    bits: int,
    group_size: int,
    seed: int,
    refine_bits: int,
) -> None:
    """Store new tokens and, unless they are a prompt's, index all that is not indexed yet."""
    key_index = None
    if state and not is_prompt:
        key_index = named_index(index, bits, group_size, seed, refine_bits, key.shape[3])
    appending.append(key_index, key, value, *split(rows, key.shape[3]), state, counters)


def _shape_of(
    named: tuple[str, int, int, int, int],
    query_size: Sequence[int],
    state: list[Tensor],
    budget: int,
    per_query_head: bool,
    refine: int,
) -> Shape:
    """The shape of a retrieval by an index, `named` as the ops take it."""
    index = named_index(*named, query_size[3])
    return Shape.of(
        index, query_size, state[0], budget=budget, per_query_head=per_query_head, refine=refine
    )


def _retrieve(
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
    refine: int,
    keys: Tensor | None,
) -> Tensor:
    """Token indices ``[B, H or Hq, T, min(budget, capacity)]``, padded with -1."""
    named = (index, bits, group_size, seed, refine_bits)
    shape = _shape_of(named, query.shape, state, budget, per_query_head, refine)
    return retrieve.retrieve(
        shape, Scratch(shape, query.device), query, state, counters, Logits(scale, softcap),
        visible, sinks=sinks, recent=recent, sink_logits=sink_logits, keys=keys,
    )  # fmt: skip


def _attend(
    query: Tensor,
    rows: list[Tensor],
    token_indices: Tensor,
    counters: Tensor,
    arrivals: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Output ``[B, T, Hq, Dv]``, heads and queries swapped as attention functions return it."""
    return attention.gather_attention(
        query, *split(rows, query.shape[3]), token_indices, scale=scale, softcap=softcap,
        sink_logits=sink_logits, counters=counters, arrivals=arrivals,
    )  # fmt: skip


def _attend_hot(
    query: Tensor,
    paired: Tensor,
    hot: list[Tensor],
    token_indices: Tensor,
    counters: Tensor,
    arrivals: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """As `_attend` for one query, by way of a hot set that it updates."""
    return attention.gather_attention(
        query, *split([paired], query.shape[3]), token_indices, scale=scale, softcap=softcap,
        sink_logits=sink_logits, counters=counters, arrivals=arrivals, hot=HotSet(*hot),
    )  # fmt: skip


def _place_ahead(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rotation: Tensor | None,
    hot: list[Tensor],
    state: list[Tensor],
    counters: Tensor,
    before: Tensor | None,
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
    refine: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start to place what an estimate of the next query selects, see `place_ahead`."""
    named = (index, bits, group_size, seed, refine_bits)
    estimate = QueryEstimate(source, weight, bias, rotation)
    shape = _shape_of(named, estimate.size, state, budget, per_query_head, refine)
    return place_ahead(
        shape, HotSet(*hot), estimate, state, counters, Logits(scale), sinks=sinks, recent=recent
    )


def _place_ahead_fake(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rotation: Tensor | None,
    hot: list[Tensor],
    state: list[Tensor],
    counters: Tensor,
    before: Tensor | None,
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
    refine: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_place_ahead` returns, without the numbers."""
    named = (index, bits, group_size, seed, refine_bits)
    size = QueryEstimate(source, weight, bias, rotation).size
    shape = _shape_of(named, size, state, budget, per_query_head, refine)
    lists = (size[0], shape.num_lists, 1, shape.width)
    return (
        source.new_empty(lists, dtype=torch.int64),
        source.new_empty((2, *lists), dtype=torch.int32),
        source.new_empty(1, dtype=torch.int64),
        source.new_empty(Scratch.nbytes_of(shape), dtype=torch.uint8),
    )


def _fetch_ahead(
    paired: Tensor,
    hot: list[Tensor],
    chosen: Tensor,
    placed: Tensor,
    length: Tensor,
    before: Tensor | None,
) -> None:
    """Start to fetch what `_place_ahead` placed."""
    fetch_ahead(HotSet(*hot), paired, chosen, placed, length)


def _await_placed(counters: Tensor, kept: list[Tensor], after: Tensor) -> None:
    """Wait until `_place_ahead` has read the index and the counters."""
    await_placed(counters)


def _await_fetched(tally: Tensor, kept: list[Tensor], after: Tensor) -> None:
    """Wait for all that `_fetch_ahead` started."""
    await_fetched(tally)


def _attend_all(
    query: Tensor,
    rows: list[Tensor],
    counters: Tensor,
    arrivals: Tensor,
    visible: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Output ``[B, T, Hq, Dv]`` of attention over all tokens stored."""
    return attention.dense_attention(
        query, *split(rows, query.shape[3]), counters, visible, scale=scale, softcap=softcap,
        sink_logits=sink_logits, arrivals=arrivals,
    )  # fmt: skip


_LIBRARY.impl("triton_append", _append, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_retrieve", _retrieve, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_attend_hot", _attend_hot, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_place_ahead", _place_ahead, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_fetch_ahead", _fetch_ahead, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_await_placed", _await_placed, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_await_fetched", _await_fetched, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_attend_all", _attend_all, "CompositeExplicitAutograd")
torch.library.register_fake("fierpatch::triton_attend_all", attend_fake, lib=_LIBRARY)
torch.library.register_fake("fierpatch::triton_append", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::triton_retrieve", retrieve_fake, lib=_LIBRARY)
torch.library.register_fake("fierpatch::triton_attend", attend_fake, lib=_LIBRARY)
torch.library.register_fake("fierpatch::triton_place_ahead", _place_ahead_fake, lib=_LIBRARY)
torch.library.register_fake("fierpatch::triton_fetch_ahead", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::triton_await_placed", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::triton_await_fetched", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::triton_attend_hot", attend_hot_fake, lib=_LIBRARY)
