"""The pieces as functions, validated, for researchers."""

from __future__ import annotations

from torch import Tensor

from fierpatch import reference
from fierpatch.errors import ShapeError
from fierpatch.index import KeyIndex
from fierpatch.reference import fold_groups, gather_attention


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
        index.calibrate(state, fold_groups(query, num_kv_heads), keys, length)
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
    refine: int = 0,
) -> tuple[Tensor, Tensor]:
    """Score by the index, select under the budget, attend exactly over the selection.

    Args:
        query: ``[B, Hq, T, D]``, the newest T of the S tokens.
        keys, values: ``[B, H, S, D]``, ``[B, H, S, Dv]``.
        index, state: from `build_index`, holding all S tokens.
        scale: multiplies ``q . k``; None means ``1 / sqrt(D)``.
        visible: bool, broadcastable to ``[B, 1, T, S]``; None means causal.
        refine: candidates that are scored again, in multiples of the budget: by the index's codes
            where it has any, else by the keys; 0 means none.

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
        refine=refine,
        keys=None if index.refined_bytes_per_token else keys,
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
