"""Which tokens to attend: sinks and recents, then the best scored, under a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch.errors import ConfigError

CANDIDATE_TEMPERATURE = 2.0  # of the softmax that chooses what is scored again


def causal_visible(num_queries: int, length: int, device: torch.device) -> Tensor:
    """Bool ``[1, 1, T, S]``: the last T of S tokens as queries, each seeing up to itself."""
    positions = torch.arange(length, device=device)
    return (positions <= positions[length - num_queries :, None])[None, None]


def to_logits(scores: Tensor, scale: float, softcap: float) -> Tensor:
    """What softmax takes: ``scale * scores``, and where softcap > 0 its capped form (Gemma 2)."""
    logits = scores * scale
    return torch.tanh(logits / softcap) * softcap if softcap > 0 else logits


def softmax_beside_sink(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last dimension beside a sink logit, which takes weight but is no token.

    Args:
        logits: ``[..., S]``.
        sink: broadcastable to ``[..., 1]`` (GPT-OSS); None means plain softmax.

    Returns:
        ``[..., S]``, which sums to less than 1 where there is a sink.
    """
    if sink is None:
        return logits.softmax(-1)
    beside = sink.to(logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.cat((logits, beside), dim=-1).softmax(-1)[..., :-1]


def attention_weights(
    scores: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """The mean over each query group of the softmax of its scores.

    Args:
        scores: estimates of ``q . k``, ``[B, Hq, T, S]``.
        num_kv_heads: H; query heads ``h * G .. (h + 1) * G`` share KV head h.
        scale: multiplies the scores, usually ``1 / sqrt(D)``.
        softcap: where positive, logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sink_logits: ``[Hq]``, a logit a head that takes weight but has no token (GPT-OSS).
        visible: bool, broadcastable to ``[B, 1, T, S]``; None means every token.

    Returns:
        ``[B, H, T, S]`` in the dtype of `scores`; 0 at invisible tokens.
    """
    logits = to_logits(scores, scale, softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    sink = None if sink_logits is None else sink_logits[:, None, None]
    weights = softmax_beside_sink(logits, sink)
    if visible is not None:
        # A row that sees nothing has no softmax.
        weights = weights.masked_fill(~visible, 0.0)
    first, *rest = weights.unflatten(1, (num_kv_heads, -1)).unbind(2)
    # One after the other: `mean` adds in an order that depends on where a token is, and equal
    # weights would come out unequal.
    total = first.clone()
    for head in rest:
        total += head
    return total / (1 + len(rest))


def select_tokens(
    priority: Tensor,
    *,
    budget: int,
    sinks: int = 0,
    recent: int = 1,
    visible: Tensor | None = None,
) -> Tensor:
    """The positions to attend: first `sinks`, last `recent`, then the highest priority.

    Equal priorities go to the lowest position, so equal scores give equal tokens everywhere.

    Args:
        priority: finite where visible, ``[B, H, T, S]``: `attention_weights`, or scores.
        budget: positions chosen for each KV head and query, sinks and recents included.
        sinks, recent: counted among the visible tokens of each row, so padding is never a sink.
        visible: bool, broadcastable to ``[B, 1, T, S]``; None means every token.

    Returns:
        int64 ``[B, H, T, min(budget, S)]``, ascending; where a row sees fewer tokens, the unused
        slots at the end are -1.

    Raises:
        ConfigError: the budget is below sinks + recent, so it could not hold the newest token.
    """
    if budget < sinks + recent:
        raise ConfigError(
            f"budget={budget} is below sinks + recent = {sinks} + {recent}, which it includes: "
            "raise budget, or lower sinks or recent"
        )
    num_tokens = priority.shape[-1]
    if visible is None:
        priority = priority.clone()
        priority[..., :sinks] = torch.inf
        priority[..., max(num_tokens - recent, 0) :] = torch.inf
    else:
        visible = visible.expand(*visible.shape[:-1], num_tokens)
        rank = visible.cumsum(-1)  # 1 at the first visible token
        is_kept = (rank <= sinks) | (rank > rank[..., -1:] - recent)
        priority = priority.masked_fill(is_kept, torch.inf).masked_fill(~visible, -torch.inf)
    return top_k(priority, min(budget, num_tokens))


def top_k(priority: Tensor, k: int) -> Tensor:
    """Positions of the k largest entries of the last dimension, ascending, ties to the lowest.

    Entries of -inf are never chosen; slots they leave unused are -1, at the end.
    """
    num_tokens = priority.shape[-1]
    if k < num_tokens:
        largest, indices = priority.topk(k, sorted=False)
        threshold = largest.amin(-1, keepdim=True)
        if priority.device.type == "cpu":
            # Without a tie at the threshold the k largest are it; asking costs no sync here.
            has_ties = ((priority >= threshold).sum(-1) > k).any() | threshold.isneginf().any()
            if not has_ties:
                return indices.sort(-1).values
        is_above = priority > threshold
        is_tie = priority == threshold
        num_ties = k - is_above.sum(-1, keepdim=True)
        chosen = is_above | (is_tie & (is_tie.cumsum(-1) <= num_ties))
    else:
        chosen = torch.ones_like(priority, dtype=torch.bool)
    chosen &= priority > -torch.inf
    # Unchosen tokens go to a slot past the end, which is cut off.
    slots = torch.where(chosen, chosen.cumsum(-1) - 1, k)
    indices = priority.new_full((*priority.shape[:-1], k + 1), -1, dtype=torch.int64)
    tokens = torch.arange(num_tokens, device=priority.device).expand_as(slots)
    return indices.scatter_(-1, slots, tokens)[..., :k].contiguous()


def select(
    scores: Tensor,
    *,
    num_kv_heads: int,
    budget: int,
    sinks: int = 0,
    recent: int = 1,
    per_query_head: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Token indices from the scores of all query heads.

    One list for each KV head by the mean of softmax over its query group, or with
    `per_query_head` one for each query head by its own scores. Arguments as in
    `attention_weights` and `select_tokens`.

    Returns:
        int64 ``[B, H or Hq, T, min(budget, S)]``.
    """
    if per_query_head:
        priority = scores
    else:
        priority = attention_weights(
            scores,
            num_kv_heads=num_kv_heads,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            visible=visible,
        )
    return select_tokens(priority, budget=budget, sinks=sinks, recent=recent, visible=visible)
