"""The library ops that patched models call, in the namespace ``torch.ops.fierpatch``.

They are opaque to the compiler and have fakes, so a model that calls them traces into one graph. A
layer's progress travels in one int64 tensor ``counters [4]``: tokens stored, tokens indexed, tokens
at the last calibration, and a number that only kernels use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch import reference
from fierpatch.hot_set import NEEDED, HotSet, fetch, place
from fierpatch.index import KeyIndex, make_index
from fierpatch.index.packing import TILE_SIZE
from fierpatch.ops.fakes import attend_fake, attend_hot_fake, retrieve_fake
from fierpatch.ops.progress import calibrate_prompt, check_capacity
from fierpatch.query_estimate import QueryEstimate
from fierpatch.reference import gather_attention
from fierpatch.rows import split

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
    places = torch.arange(stored, stop, device=key.device)
    # By a kernel: a plain copy to the host may be the driver's, over the ends of pinned pieces.
    keys.index_copy_(2, places, key)
    values.index_copy_(2, places, value)
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
