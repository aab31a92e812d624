"""The library ops that patched models call, in the namespace ``torch.ops.fierpatch``.

They are opaque to the compiler and have fakes, so a model that calls them traces into one graph. A
layer's progress travels in one int64 tensor ``counters [4]``: tokens stored, tokens indexed, tokens
at the last calibration, and a number that only kernels use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fierpatch import reference
from fierpatch.errors import CapacityError
from fierpatch.hot_set import NEEDED, HotSet, fetch, place
from fierpatch.index import KeyIndex, make_index
from fierpatch.index.packing import TILE_SIZE
from fierpatch.query_estimate import QueryEstimate
from fierpatch.reference import fold_groups, gather_attention
from fierpatch.rows import split

_MAX_CALIBRATION_QUERIES = 256
_CALIBRATION_WINDOW = 4096  # newest queries, which left padding reaches last

# The ops read lengths on the host, which a CUDA graph cannot replay: the tag keeps them out of one.
_LIBRARY = torch.library.Library("fierpatch", "DEF")
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_fixed_stride_order)
_INDEX = "str index, int bits, int group_size, int seed, int refine_bits"
_LIBRARY.define(
    "append(Tensor key, Tensor value, Tensor(a!)[] rows, Tensor(b!)[] state, "
    f"Tensor(c!) counters, bool is_prompt, {_INDEX}) -> ()",
    tags=_TAGS,
)
_LIBRARY.define(
    "index_prompt(Tensor query, Tensor keys, Tensor(a!)[] state, Tensor(b!) counters, "
    f"{_INDEX}) -> ()",
    tags=_TAGS,
)
_LIBRARY.define(
    "retrieve(Tensor query, Tensor[] state, Tensor counters, Tensor? visible, "
    f"Tensor? sink_logits, {_INDEX}, int budget, int sinks, int recent, bool per_query_head, "
    "float scale, float softcap, int refine, Tensor? keys) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "attend(Tensor query, Tensor[] rows, Tensor token_indices, "
    "Tensor? sink_logits, float scale, float softcap) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    # Of the counters nothing changes, but whoever does change them has to come after.
    "fetch_ahead(Tensor source, Tensor? weight, Tensor? bias, Tensor? rotation, Tensor paired, "
    f"Tensor(a!)[] hot, Tensor[] state, Tensor(b!) counters, {_INDEX}, int budget, int sinks, "
    "int recent, bool per_query_head, float scale, int refine) -> ()",
    tags=_TAGS,
)
_LIBRARY.define(
    "attend_hot(Tensor query, Tensor paired, Tensor(a!)[] hot, Tensor token_indices, "
    "Tensor? sink_logits, float scale, float softcap) -> Tensor",
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
    keys, values = split(rows, key.shape[3])
    stored, indexed, calibrated = counters.tolist()[:3]
    check_capacity(stored, key.shape[2], keys.shape[2])
    stop = stored + key.shape[2]
    keys[:, :, stored:stop] = key
    values[:, :, stored:stop] = value
    if state and not is_prompt:
        named_index(index, bits, group_size, seed, refine_bits, keys.shape[3]).append(
            state, keys, indexed, stop
        )
        indexed = stop
    counters.copy_(torch.tensor((stop, indexed, calibrated, 0)))


def _index_prompt(
    query: Tensor,
    keys: Tensor,
    state: list[Tensor],
    counters: Tensor,
    index: str,
    bits: int,
    group_size: int,
    seed: int,
    refine_bits: int,
) -> None:
    """Index a prompt by its own queries."""
    key_index = named_index(index, bits, group_size, seed, refine_bits, keys.shape[3])
    progress = counters.tolist()[:3]
    stored, indexed, calibrated = calibrate_prompt(key_index, query, keys, state, progress)
    key_index.append(state, keys, indexed, stored)
    counters.copy_(torch.tensor((stored, stored, calibrated, 0)))


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
    """Token indices ``[B, H or Hq, T, min(budget, capacity)]``, padded with -1.

    The keys ``[B, H, C, D]`` are given where `refine` is by them, and not by codes.
    """
    length = int(counters[0])
    token_indices = reference.select_from_index(
        named_index(index, bits, group_size, seed, refine_bits, query.shape[3]),
        state,
        query,
        length,
        budget=budget,
        sinks=sinks,
        recent=recent,
        per_query_head=per_query_head,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        visible=None if visible is None else visible[..., :length],
        refine=refine,
        keys=keys,
    )
    width = min(budget, state[0].shape[2] * TILE_SIZE)
    missing = width - token_indices.shape[3]
    return torch.nn.functional.pad(token_indices, (0, missing), value=-1)


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


def _attend(
    query: Tensor,
    rows: list[Tensor],
    token_indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Output ``[B, T, Hq, Dv]``, heads and queries swapped as attention functions return it."""
    output = gather_attention(
        query,
        *split(rows, query.shape[3]),
        token_indices,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return output.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _attend_hot(
    query: Tensor,
    paired: Tensor,
    hot: list[Tensor],
    token_indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """As `_attend` for one query, by way of a hot set that it updates."""
    hot_set = HotSet(*hot)
    rows = fetch(hot_set, place(hot_set, token_indices), token_indices, paired)
    held = list(hot_set.rows.tensor_split((query.shape[3],), dim=3))
    return _attend(query, held, rows, sink_logits, scale, softcap)


def _fetch_ahead(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rotation: Tensor | None,
    paired: Tensor,
    hot: list[Tensor],
    state: list[Tensor],
    counters: Tensor,
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
) -> None:
    """Fetch what an estimate of the next query selects of the tokens that are there, if it pays."""
    length, hot_set = int(counters[0]), HotSet(*hot)
    least = hot_set.least_needed(min(budget, length))
    if length == 0 or int(hot_set.tally[..., NEEDED].sum()) < least:
        return
    query = QueryEstimate(source, weight, bias, rotation).query()
    token_indices = reference.select_from_index(
        named_index(index, bits, group_size, seed, refine_bits, query.shape[3]),
        state,
        query,
        length,
        budget=budget,
        sinks=sinks,
        recent=recent,
        per_query_head=per_query_head,
        scale=scale,
        refine=refine,
    )
    fetch(hot_set, place(hot_set, token_indices, is_prefetch=True), token_indices, paired)


def attend_fake(query: Tensor, rows: list[Tensor], *rest: Any) -> Tensor:
    """What attention returns, ``[B, T, Hq, Dv]``, without the numbers."""
    batch_size, num_query_heads, num_queries, head_dim = query.shape
    values = split(rows, head_dim)[1]
    return query.new_empty((batch_size, num_queries, num_query_heads, values.shape[3]))


def attend_hot_fake(query: Tensor, paired: Tensor, *rest: Any) -> Tensor:
    """What attention by way of a hot set returns, without the numbers."""
    return attend_fake(query, [paired])


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


_LIBRARY.impl("append", _append, "CompositeExplicitAutograd")
_LIBRARY.impl("index_prompt", _index_prompt, "CompositeExplicitAutograd")
_LIBRARY.impl("retrieve", _retrieve, "CompositeExplicitAutograd")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_hot", _attend_hot, "CompositeExplicitAutograd")
_LIBRARY.impl("fetch_ahead", _fetch_ahead, "CompositeExplicitAutograd")
torch.library.register_fake("fierpatch::append", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::index_prompt", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::retrieve", retrieve_fake, lib=_LIBRARY)
torch.library.register_fake("fierpatch::attend", attend_fake, lib=_LIBRARY)
torch.library.register_fake("fierpatch::attend_hot", attend_hot_fake, lib=_LIBRARY)
torch.library.register_fake("fierpatch::fetch_ahead", lambda *args: None, lib=_LIBRARY)


def named_index(
    name: str, bits: int, group_size: int, seed: int, refine_bits: int, head_dim: int
) -> KeyIndex:
    """The index that an op names, for keys of `head_dim` channels."""
    return make_index(
        name,
        head_dim=head_dim,
        bits=bits,
        group_size=group_size,
        seed=seed,
        refine_bits=refine_bits,
    )
