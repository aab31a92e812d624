"""The specification: eager retrieval attention, on any device and in float64 where asked.

Kernels, masks and tiers are each tested against these functions and never against each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch.index import KeyIndex
from fierpatch.select import (
    CANDIDATE_TEMPERATURE,
    causal_visible,
    select,
    softmax_beside_sink,
    to_logits,
)


def exact_scores(query: Tensor, keys: Tensor) -> Tensor:
    """``q . k`` for every query head and token.

    Args:
        query: ``[B, Hq, T, D]``.
        keys: ``[B, H, S, D]``.

    Returns:
        ``[B, Hq, T, S]``, float32, or float64 where the query is.
    """
    dtype = _working_dtype(query)
    grouped = fold_groups(query.to(dtype), keys.shape[1])  # [B, H, G * T, D]
    return unfold_groups(grouped @ keys.to(dtype).transpose(2, 3), query)


def index_scores(
    index: KeyIndex, state: list[Tensor], query: Tensor, length: int, *, margin: float = 0.0
) -> Tensor:
    """The index's estimate of ``q . k``: float32 ``[B, Hq, T, length]``."""
    grouped = fold_groups(query.float(), state[0].shape[1])
    return unfold_groups(index.scores(state, grouped, length, margin=margin), query)


def refined_scores(
    index: KeyIndex,
    state: list[Tensor],
    query: Tensor,
    candidates: Tensor,
    length: int,
    keys: Tensor | None = None,
) -> Tensor:
    """Scores of the candidates alone, by the index's codes or by the keys themselves.

    Args:
        query: ``[B, Hq, T, D]``.
        candidates: int64 ``[B, H or Hq, T, n]``; -1 marks an unused slot.
        length: S, tokens stored.
        keys: ``[B, H, C, D]``; None means the index's codes.

    Returns:
        float32 ``[B, Hq, T, S]``, -inf where a token is no candidate.
    """
    num_kv_heads, num_lists = state[0].shape[1], candidates.shape[1]
    num_queries = query.shape[2]
    # Each list of a KV head with the queries that it serves: [B, H, lists of it * T, heads, D].
    shared = query.float().unflatten(1, (num_lists, -1)).transpose(2, 3)
    shared = shared.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
    is_used = candidates >= 0
    tokens = candidates.clamp_min(0).unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
    if keys is None:
        scores = index.refined_scores(state, shared, tokens)
    else:
        at = tokens.flatten(2).unsqueeze(3).expand(-1, -1, -1, keys.shape[3])
        rows = keys.gather(2, at).float().unflatten(2, tokens.shape[2:])
        scores = shared @ rows.transpose(3, 4)
    scores = scores.unflatten(2, (-1, num_queries)).flatten(1, 2)  # [B, lists, T, heads, n]
    scores = scores.transpose(2, 3).flatten(1, 2)
    # Unused slots go to a token past the end, which is cut off.
    place = torch.where(is_used, candidates, length)
    place = place.repeat_interleave(query.shape[1] // num_lists, 1)
    spread = scores.new_full((*scores.shape[:3], length + 1), -torch.inf)
    return spread.scatter_(3, place, scores)[..., :length]


def select_from_index(
    index: KeyIndex,
    state: list[Tensor],
    query: Tensor,
    length: int,
    *,
    budget: int,
    sinks: int,
    recent: int,
    per_query_head: bool,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    visible: Tensor | None = None,
    refine: int = 0,
    keys: Tensor | None = None,
) -> Tensor:
    """Score every token, then select; with `refine` score the best of them again before that.

    Candidates are chosen by what a token may weigh, not by what it is thought to weigh: with the
    index's own margin, and by a softmax of twice the temperature. The second scoring sorts them.

    Args:
        index, state: the key index of the layer.
        query: ``[B, Hq, T, D]``, the newest T of `length` tokens.
        length: tokens stored, those of the query included.
        visible: bool, broadcastable to ``[B, 1, T, length]``; None means causal.
        refine: candidates in multiples of the budget; 0 selects by the first scores.
        keys: ``[B, H, C, D]``, to score candidates exactly; None means the index's codes.

    Returns:
        int64 ``[B, H or Hq, T, min(budget, length)]``, see `select_tokens`.
    """
    num_queries = query.shape[2]
    if visible is None and num_queries > 1:
        visible = causal_visible(num_queries, length, query.device)
    margin = index.candidate_margin if refine else 0.0
    scores = index_scores(index, state, query, length, margin=margin)

    def best(scores: Tensor, budget: int, temperature: float) -> Tensor:
        return select(
            scores,
            num_kv_heads=state[0].shape[1],
            budget=budget,
            sinks=sinks,
            recent=recent,
            per_query_head=per_query_head,
            scale=scale / temperature,
            softcap=softcap / temperature,
            sink_logits=None if sink_logits is None else sink_logits / temperature,
            visible=visible,
        )

    if refine:
        candidates = best(scores, refine * budget, CANDIDATE_TEMPERATURE)
        scores = refined_scores(index, state, query, candidates, length, keys)
    return best(scores, budget, 1.0)


def gather_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    token_indices: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Exact attention over the chosen tokens only.

    Args:
        query: ``[B, Hq, T, D]``.
        keys: ``[B, H, S, D]``.
        values: ``[B, H, S, Dv]``.
        token_indices: integers ``[B, H or Hq, T, K]``; -1 marks an unused slot.
        scale, softcap, sink_logits: as in `attention_weights`.

    Returns:
        ``[B, Hq, T, Dv]`` in the query's dtype, computed in float32 (float64 where the query is);
        0 for a query without tokens.
    """
    batch_size, num_kv_heads, num_lists = *keys.shape[:2], token_indices.shape[1]
    dtype = _working_dtype(query)
    is_used = token_indices >= 0
    # An unused slot reads a token that the row does use: its weight is 0, and padding may be NaN.
    rows = torch.where(is_used, token_indices, token_indices.amax(-1, keepdim=True).clamp_min(0))
    kv_head = torch.arange(num_lists, device=query.device) // (num_lists // num_kv_heads)
    batch = torch.arange(batch_size, device=query.device)
    row_of_head = batch[:, None] * num_kv_heads + kv_head
    flat = (row_of_head[:, :, None, None] * keys.shape[2] + rows).flatten()

    def gather(tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            chosen = tensor.view(-1, tensor.shape[-1]).index_select(0, flat)
            return chosen.view(*rows.shape, -1).to(dtype)  # [B, lists, T, K, D]
        # Paired rows: to lay them out otherwise would copy all there are.
        return tensor[batch[:, None, None, None], kv_head[:, None, None], rows].to(dtype)

    grouped = query.to(dtype).unflatten(1, (num_lists, -1)).transpose(2, 3)  # [B, lists, T, G, D]
    logits = to_logits(grouped @ gather(keys).transpose(3, 4), scale, softcap)
    logits = logits.masked_fill(~is_used.unsqueeze(3), -torch.inf)
    sink = None if sink_logits is None else sink_logits.view(num_lists, 1, -1, 1)
    weights = softmax_beside_sink(logits, sink)
    output = weights @ gather(values)  # [B, lists, T, G, Dv]
    output = torch.where(is_used.any(-1)[..., None, None], output, 0.0)
    return output.transpose(2, 3).flatten(1, 2).to(query.dtype)


def masked_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Dense attention over the tokens that a boolean mask allows.

    Args:
        query: ``[B, Hq, T, D]``.
        keys, values: ``[B, H, S, D]``, ``[B, H, S, Dv]``.
        visible: bool, broadcastable to ``[B, Hq, T, S]``.

    Returns:
        ``[B, Hq, T, Dv]`` in the query's dtype; 0 for a query that sees nothing.
    """
    dtype = _working_dtype(query)
    logits = to_logits(exact_scores(query, keys), scale, softcap).masked_fill(~visible, -torch.inf)
    sink = None if sink_logits is None else sink_logits[:, None, None]
    weights = softmax_beside_sink(logits, sink)
    visible = visible.expand_as(weights)
    weights = weights.masked_fill(~visible, 0.0)
    grouped = weights.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B, H, G * T, S]
    # A token that no query of the row sees may hold NaN, which a weight of 0 would let through.
    is_seen = visible.unflatten(1, (keys.shape[1], -1)).any(2).any(2)  # [B, H, S]
    output = grouped @ values.to(dtype).masked_fill(~is_seen.unsqueeze(3), 0.0)
    return unfold_groups(output, query).to(query.dtype)


def attention_mass(
    query: Tensor,
    keys: Tensor,
    token_indices: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    visible: Tensor | None = None,
) -> Tensor:
    """The share of exact attention weight that falls on the chosen tokens.

    Arguments as in `gather_attention` and `attention_weights`. Where a model has attention sinks
    this is the share among tokens: what goes to the sink is on neither side.

    Returns:
        ``[B, Hq, T]`` in 0 .. 1.
    """
    num_query_heads = query.shape[1]
    if visible is None and query.shape[2] > 1:
        visible = causal_visible(query.shape[2], keys.shape[2], query.device)
    logits = to_logits(exact_scores(query, keys), scale, softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.softmax(-1)
    lists = token_indices.repeat_interleave(num_query_heads // token_indices.shape[1], dim=1)
    return weights.gather(-1, lists.clamp_min(0)).masked_fill(lists < 0, 0.0).sum(-1)


def _working_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def fold_groups(query: Tensor, num_kv_heads: int) -> Tensor:
    """``[B, Hq, T, D]`` to ``[B, H, G * T, D]``: one product a KV head serves its whole group."""
    return query.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)


def unfold_groups(grouped: Tensor, query: Tensor) -> Tensor:
    """``[B, H, G * T, n]`` back to ``[B, Hq, T, n]``."""
    return grouped.unflatten(2, (-1, query.shape[2])).flatten(1, 2)
