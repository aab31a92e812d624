"""The operators: validated functions for researchers, and the library ops that models call.

The library ops live in the namespace ``torch.ops.fierpatch``. They are opaque to the compiler and
have fakes, so a model that calls them traces into one graph. A layer's progress travels in one
int64 tensor ``counters``: tokens stored, tokens indexed, tokens at the last calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch import reference
from fierpatch.errors import CapacityError, ShapeError
from fierpatch.index import KeyIndex, make_index
from fierpatch.reference import attention_mass, gather_attention, masked_attention
from fierpatch.select import select

__all__ = [
    "append_keys",
    "attention_mass",
    "build_index",
    "gather_attention",
    "index_scores",
    "masked_attention",
    "select",
    "retrieval_attention",
]

_MAX_CALIBRATION_QUERIES = 256
_CALIBRATION_WINDOW = 4096


def build_index(
    index: KeyIndex, keys: Tensor, *, query: Tensor | None = None, capacity: int | None = None
) -> list[Tensor]:
    """Index all of `keys` at once.

    Args:
        index: what to build, from `fierpatch.index.make_index`.
        keys: ``[B, H, S, D]``, after RoPE.
        query: ``[B, Hq, n, D]``, sampled queries to calibrate by; None leaves the index
            uncalibrated.
        capacity: tokens to make room for, at least S; None means S.

    Returns:
        The state, to be given to `index_scores` and `append_keys`.

    Raises:
        ShapeError: the keys are not 4-D, or their head_dim is not the index's.
    """
    _check_keys(index, keys)
    batch_size, num_kv_heads, length, _ = keys.shape
    state = index.allocate(batch_size, num_kv_heads, max(capacity or 0, length), keys.device)
    if query is not None:
        _check_query(query, keys)
        index.calibrate(state, reference._fold_groups(query, num_kv_heads), keys, length)
    index.append(state, keys, 0, length)
    return state


def append_keys(
    index: KeyIndex, state: list[Tensor], keys: Tensor, *, start: int, stop: int
) -> None:
    """Index tokens ``start .. stop`` of ``keys [B, H, C, D]`` in place.

    Raises:
        ShapeError: the keys do not fit the state, or the range is not within both.
    """
    _check_keys(index, keys)
    capacity = _check_state(state, keys)
    if not 0 <= start <= stop <= min(keys.shape[2], capacity):
        raise ShapeError(
            f"cannot index tokens {start} .. {stop} of {keys.shape[2]} keys into a state of "
            f"{capacity} tokens: want 0 <= start <= stop within both"
        )
    index.append(state, keys, start, stop)


def index_scores(index: KeyIndex, state: list[Tensor], query: Tensor, length: int) -> Tensor:
    """Estimates of ``q . k`` for ``query [B, Hq, T, D]``: float32 ``[B, Hq, T, length]``.

    Raises:
        ShapeError: the query's head_dim or heads do not fit, or `length` is past the capacity.
    """
    planes = state[0]
    _check_query(query, planes)
    if not 0 < length <= planes.shape[2] * 512:
        raise ShapeError(f"length={length} is outside 1 .. {planes.shape[2] * 512}, the capacity")
    return reference.index_scores(index, state, query, length)


def retrieval_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: KeyIndex,
    state: list[Tensor],
    *,
    budget: int,
    sinks: int = 4,
    recent: int = 16,
    per_query_head: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score by the index, select under the budget, attend exactly over the selection.

    Args:
        query: ``[B, Hq, T, D]``, the newest T of the S tokens.
        keys, values: ``[B, H, S, D]``, ``[B, H, S, Dv]``.
        index, state: from `build_index`, holding all S tokens.
        scale: multiplies ``q . k``; None means ``1 / sqrt(D)``.
        visible: bool, broadcastable to ``[B, 1, T, S]``; None means causal.

    Returns:
        Output ``[B, Hq, T, Dv]`` and token indices ``[B, H or Hq, T, min(budget, S)]``.

    Raises:
        ShapeError: the tensors do not fit each other.
        ConfigError: the budget is below sinks + recent.
    """
    _check_keys(index, keys)
    _check_query(query, keys)
    if values.shape[:3] != keys.shape[:3]:
        raise ShapeError(
            f"values {tuple(values.shape)} and keys {tuple(keys.shape)} differ in [B, H, S]"
        )
    num_queries, length = query.shape[2], keys.shape[2]
    if not num_queries <= length <= _check_state(state, keys):
        raise ShapeError(
            f"{num_queries} queries, {length} keys and an index with room for "
            f"{state[0].shape[2] * 512}: want at least as many keys as queries, all indexed"
        )
    scale = query.shape[3] ** -0.5 if scale is None else scale
    token_indices = reference.select_from_index(
        index,
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
        visible=visible,
    )
    output = gather_attention(
        query,
        keys,
        values,
        token_indices,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return output, token_indices


# The ops read lengths on the host, which a CUDA graph cannot replay: the tag keeps them out of one.
_LIBRARY = torch.library.Library("fierpatch", "DEF")  # noqa: TOR901
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_fixed_stride_order)
_INDEX = "str index, int bits, int group_size, int seed"
_LIBRARY.define(
    "append(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!)[] state, "
    f"Tensor(d!) counters, bool is_prompt, {_INDEX}) -> ()",
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
    "float scale, float softcap) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "attend(Tensor query, Tensor keys, Tensor values, Tensor token_indices, "
    "Tensor? sink_logits, float scale, float softcap) -> Tensor",
    tags=_TAGS,
)


def _append(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    state: list[Tensor],
    counters: Tensor,
    is_prompt: bool,
    index: str,
    bits: int,
    group_size: int,
    seed: int,
) -> None:
    """Store new tokens and, unless they are a prompt's, index all that is not indexed yet."""
    stored, indexed, calibrated = counters.tolist()
    stop = stored + key.shape[2]
    if stop > keys.shape[2]:
        raise CapacityError(
            f"{stored} tokens are stored and {key.shape[2]} more do not fit a static cache of "
            f"{keys.shape[2]}: generate with a larger max_cache_len, or without a static cache"
        )
    keys[:, :, stored:stop] = key
    values[:, :, stored:stop] = value
    if state and not is_prompt:
        _index(index, bits, group_size, seed, keys).append(state, keys, indexed, stop)
        indexed = stop
    counters.copy_(torch.tensor((stop, indexed, calibrated)))


def _index_prompt(
    query: Tensor,
    keys: Tensor,
    state: list[Tensor],
    counters: Tensor,
    index: str,
    bits: int,
    group_size: int,
    seed: int,
) -> None:
    """Index a prompt by its own queries; calibrate anew when the tokens have doubled.

    Doubling keeps the work of a prompt that comes in chunks within twice that of one that does not.
    """
    stored, indexed, calibrated = counters.tolist()
    key_index = _index(index, bits, group_size, seed, keys)
    if stored >= 2 * calibrated:
        window = min(query.shape[2], _CALIBRATION_WINDOW)
        step = -(-window // _MAX_CALIBRATION_QUERIES)
        sampled = query[:, :, query.shape[2] - window :][:, :, ::step]
        sampled = reference._fold_groups(sampled, keys.shape[1])
        if key_index.calibrate(state, sampled, keys, stored):
            indexed, calibrated = 0, stored
    key_index.append(state, keys, indexed, stored)
    counters.copy_(torch.tensor((stored, stored, calibrated)))


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
    budget: int,
    sinks: int,
    recent: int,
    per_query_head: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    """Token indices ``[B, H or Hq, T, min(budget, capacity)]``, padded with -1."""
    length = int(counters[0])
    token_indices = reference.select_from_index(
        _index(index, bits, group_size, seed, query),
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
    )
    width = min(budget, state[0].shape[2] * 512)
    missing = width - token_indices.shape[3]
    return torch.nn.functional.pad(token_indices, (0, missing), value=-1)


def _retrieve_fake(
    query: Tensor,
    state: list[Tensor],
    counters: Tensor,
    visible: Tensor | None,
    sink_logits: Tensor | None,
    index: str,
    bits: int,
    group_size: int,
    seed: int,
    budget: int,
    sinks: int,
    recent: int,
    per_query_head: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    num_lists = query.shape[1] if per_query_head else state[0].shape[1]
    width = min(budget, state[0].shape[2] * 512)
    return query.new_empty((query.shape[0], num_lists, query.shape[2], width), dtype=torch.int64)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    token_indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Output ``[B, T, Hq, Dv]``, heads and queries swapped as attention functions return it."""
    output = gather_attention(
        query,
        keys,
        values,
        token_indices,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return output.transpose(1, 2).contiguous()


def _attend_fake(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    token_indices: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    batch_size, num_query_heads, num_queries, _ = query.shape
    return query.new_empty((batch_size, num_queries, num_query_heads, values.shape[3]))


_LIBRARY.impl("append", _append, "CompositeExplicitAutograd")
_LIBRARY.impl("index_prompt", _index_prompt, "CompositeExplicitAutograd")
_LIBRARY.impl("retrieve", _retrieve, "CompositeExplicitAutograd")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("fierpatch::append", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::index_prompt", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("fierpatch::retrieve", _retrieve_fake, lib=_LIBRARY)
torch.library.register_fake("fierpatch::attend", _attend_fake, lib=_LIBRARY)


def _index(name: str, bits: int, group_size: int, seed: int, like: Tensor) -> KeyIndex:
    return make_index(name, head_dim=like.shape[3], bits=bits, group_size=group_size, seed=seed)


def _check_keys(index: KeyIndex, keys: Tensor) -> None:
    if keys.ndim != 4 or keys.shape[3] != index.head_dim:
        raise ShapeError(
            f"keys of shape {tuple(keys.shape)} do not fit an index of head_dim "
            f"{index.head_dim}: want [B, H, S, {index.head_dim}]"
        )


def _check_state(state: list[Tensor], keys: Tensor) -> int:
    """The tokens that the state has room for, if it belongs to such keys."""
    planes = state[0]
    if planes.shape[:2] != keys.shape[:2] or planes.shape[4] != keys.shape[3]:
        raise ShapeError(
            f"the state is of {planes.shape[0]} rows, {planes.shape[1]} KV heads and head_dim "
            f"{planes.shape[4]}, and keys of shape {tuple(keys.shape)} do not fit it"
        )
    return planes.shape[2] * 512


def _check_query(query: Tensor, like: Tensor) -> None:
    """`like` leads with B and H and ends with D: keys, or the planes of a state."""
    batch_size, num_kv_heads, head_dim = like.shape[0], like.shape[1], like.shape[-1]
    fits = (
        query.ndim == 4
        and query.shape[0] == batch_size
        and query.shape[1] % num_kv_heads == 0
        and query.shape[3] == head_dim
    )
    if not fits:
        raise ShapeError(
            f"query of shape {tuple(query.shape)} does not fit keys of {batch_size} rows, "
            f"{num_kv_heads} KV heads and head_dim {head_dim}: want [B, a multiple of H, T, D]"
        )
