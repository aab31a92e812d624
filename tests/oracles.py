"""What the library ought to compute, written a second time: float64, in loops, from the papers.

Nothing here calls the library. Tensors become float64 arrays by `exact`; a KV head is one array
``[S, D]`` at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

FLOAT16_EPS = 2.0**-11  # half the distance from 1 to the next float16: the error of rounding
FLOAT16_STEP = 2.0**-25  # half the smallest subnormal float16
FLOAT32_EPS = 2.0**-24


def exact(tensor: Tensor) -> Array:
    """The tensor's numbers in float64, which holds those of every smaller dtype."""
    return tensor.detach().double().numpy()


def half_error(x: Array) -> Array:
    """The largest error of rounding `x` to float16, where it does not saturate."""
    return np.abs(x) * FLOAT16_EPS + FLOAT16_STEP


def fier_quantize(keys: Array, group_size: int) -> tuple[BoolArray, Array, Array]:
    """Bits ``[S, D]``, and zero and scale ``[groups, D]`` (arXiv 2508.08256, section 3.1)."""
    length, head_dim = keys.shape
    bits = np.zeros((length, head_dim), dtype=bool)
    zeros, scales = [], []
    for start in range(0, length, group_size):
        group = keys[start : start + group_size]
        highest, lowest = group.max(axis=0), group.min(axis=0)
        zero, scale = (highest + lowest) / 2, (highest - lowest) / 2
        bits[start : start + group_size] = group >= zero
        zeros.append(zero)
        scales.append(scale)
    return bits, np.array(zeros), np.array(scales)


def fier_dequantize(bits: BoolArray, zero: Array, scale: Array, group_size: int) -> Array:
    """The group's highest key entry where the bit is set, else its lowest: ``[S, D]``."""
    keys = np.empty(bits.shape)
    for token, token_bits in enumerate(bits):
        group = token // group_size
        keys[token] = np.where(token_bits, zero[group] + scale[group], zero[group] - scale[group])
    return keys


def sylvester(order: int) -> Array:
    """The Hadamard matrix of a power-of-two order, by Sylvester's doubling; not normalised."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotation(head_dim: int, seed: int) -> Array:
    """The orthogonal matrix ``[D, D]`` that rotates a row x as ``x @ matrix``.

    Random signs, then for D = odd * power a reflection that mixes the odd blocks and a Hadamard
    transform within each.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = exact(torch.randint(0, 2, (head_dim,), generator=generator)) * 2 - 1
    power = 1
    while head_dim % (2 * power) == 0:
        power *= 2
    odd = head_dim // power
    reflection = np.eye(odd) - 2.0 / odd * np.ones((odd, odd)) if odd > 1 else np.eye(1)
    mixed: Array = np.kron(reflection, sylvester(power) / np.sqrt(power))
    return signs[:, None] * mixed


def rotated_centres(keys: Array, group_size: int) -> Array:
    """The centre of every group: its mean, or the last whole group's where it is not whole."""
    whole = len(keys) // group_size
    centres = [keys[g * group_size : (g + 1) * group_size].mean(axis=0) for g in range(whole)]
    if len(keys) % group_size:
        centres.append(centres[-1] if centres else np.zeros(keys.shape[1]))
    return np.array(centres)


def rotated_keys(
    keys: Array, centres: Array, balance: Array, matrix: Array, group_size: int
) -> Array:
    """``x = R (d * (k - mu))`` for every token, ``[S, D]``."""
    rows = [
        (balance * (key - centres[token // group_size])) @ matrix for token, key in enumerate(keys)
    ]
    return np.array(rows)


def rotated_levels(x: Array, bits: int) -> tuple[Array, Array]:
    """Levels ``[S, D]`` and scales ``[S]`` with ``<level * scale, x> = |x|^2``."""
    levels, scales = np.empty(x.shape), np.zeros(len(x))
    for token, row in enumerate(x):
        signs = np.where(row >= 0, 1.0, -1.0)
        if bits == 2:
            sigma = np.sqrt(np.mean(row**2))
            signs *= np.where(np.abs(row) > 0.9816 * sigma, 3.0, 1.0)
        levels[token] = signs
        overlap = float(row @ signs)
        scales[token] = float(row @ row) / overlap if overlap > 0 else 0.0
    return levels, scales


def rotated_dequantize(
    levels: Array, scales: Array, centres: Array, balance: Array, matrix: Array, group_size: int
) -> Array:
    """``mu + R' (a b) / d``: ``[S, D]``."""
    keys = np.empty(levels.shape)
    for token, level in enumerate(levels):
        centred = (scales[token] * level) @ matrix.T / balance
        keys[token] = centres[token // group_size] + centred
    return keys


def select_tokens(
    priority: Sequence[float],
    visible: Sequence[bool],
    *,
    budget: int,
    sinks: int,
    recent: int,
) -> list[int]:
    """First visible `sinks`, last visible `recent`, then the best; ties to the lowest position."""
    seen = [token for token, is_visible in enumerate(visible) if is_visible]
    kept = {*seen[:sinks], *seen[len(seen) - min(recent, len(seen)) :]}
    ranked = sorted(seen, key=lambda token: (token not in kept, -priority[token], token))
    chosen = sorted(ranked[:budget])
    return chosen + [-1] * (min(budget, len(priority)) - len(chosen))


def two_stages(
    first: Array,
    second: Array,
    visible: BoolArray,
    *,
    num_lists: int,
    budget: int,
    refine: int,
    sinks: int,
    recent: int,
    scale: float,
) -> NDArray[np.int64]:
    """Lists ``[B, lists, T, min(budget, S)]`` where candidates by `first` are scored by `second`.

    Both are ``[B, Hq, T, S]``, `visible` ``[B, 1, T, S]``. A list serves ``Hq / lists`` heads by
    the mean of their softmax, of candidates at temperature 2; ties go to the lowest position.
    """
    batch_size, num_query_heads, num_queries, length = first.shape
    group = num_query_heads // num_lists
    lists = np.full((batch_size, num_lists, num_queries, min(budget, length)), -1)
    for b, n, t in np.ndindex(lists.shape[:3]):
        tokens = np.flatnonzero(visible[b, 0, t])
        kept = [*tokens[:sinks], *tokens[max(len(tokens) - recent, 0) :]]
        for scores, size, temperature in ((first, refine * budget, 2), (second, budget, 1)):
            logits = scores[b, n * group : (n + 1) * group, t][:, tokens] * scale / temperature
            weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
            weights /= weights.sum(axis=1, keepdims=True)
            order = np.lexsort((tokens, -weights.mean(axis=0), ~np.isin(tokens, kept)))
            tokens = np.sort(tokens[order[:size]])
        lists[b, n, t, : len(tokens)] = tokens
    return lists


def _softmax(logits: Array, sink: float | None) -> Array:
    highest = max([*logits, *([] if sink is None else [sink])])
    exponentials = np.exp(logits - highest)
    extra = 0.0 if sink is None else float(np.exp(sink - highest))
    weights: Array = exponentials / (exponentials.sum() + extra)
    return weights


def _capped(logits: Array, softcap: float) -> Array:
    return np.tanh(logits / softcap) * softcap if softcap > 0 else logits


def attention_weights(
    scores: Array,
    visible: BoolArray,
    *,
    num_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Array | None = None,
) -> Array:
    """Mean over the query group of the softmax over visible scores: ``[B, H, T, S]``.

    `scores` is ``[B, Hq, T, S]``, `visible` ``[B, 1, T, S]``.
    """
    batch_size, num_query_heads, num_queries, length = scores.shape
    num_groups = num_query_heads // num_kv_heads
    weights = np.zeros((batch_size, num_kv_heads, num_queries, length))
    for b, h, t in np.ndindex(batch_size, num_query_heads, num_queries):
        seen = visible[b, 0, t]
        if seen.any():
            logits = _capped(scores[b, h, t, seen] * scale, softcap)
            sink = None if sink_logits is None else float(sink_logits[h])
            weights[b, h // num_groups, t, seen] += _softmax(logits, sink) / num_groups
    return weights


def attention(
    query: Array,
    keys: Array,
    values: Array,
    attended: BoolArray,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Array | None = None,
) -> Array:
    """Attention of each query over the tokens that ``attended [B, Hq, T, S]`` names, else 0."""
    batch_size, num_query_heads, num_queries, _ = query.shape
    num_groups = num_query_heads // keys.shape[1]
    output = np.zeros((*query.shape[:3], values.shape[3]))
    for b, h, t in np.ndindex(batch_size, num_query_heads, num_queries):
        chosen = attended[b, h, t]
        if chosen.any():
            kv_head = h // num_groups
            logits = _capped(keys[b, kv_head, chosen] @ query[b, h, t] * scale, softcap)
            sink = None if sink_logits is None else float(sink_logits[h])
            output[b, h, t] = _softmax(logits, sink) @ values[b, kv_head, chosen]
    return output


def attended_by(token_indices: Tensor, num_query_heads: int, length: int) -> BoolArray:
    """Bool ``[B, Hq, T, S]`` of the positions that lists ``[B, H or Hq, T, K]`` hold."""
    lists = token_indices.numpy()
    shared = num_query_heads // lists.shape[1]
    attended = np.zeros((lists.shape[0], num_query_heads, lists.shape[2], length), dtype=bool)
    for b, h, t in np.ndindex(attended.shape[:3]):
        tokens = lists[b, h // shared, t]
        attended[b, h, t, tokens[tokens >= 0]] = True
    return attended


def eager_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Plain attention in the tensors' own dtype, as a model's eager code has it.

    What rounding costs here is the yardstick for what it may cost the library.
    """
    num_groups = query.shape[1] // keys.shape[1]
    keys, values = (x.nan_to_num().repeat_interleave(num_groups, 1) for x in (keys, values))
    logits = query @ keys.transpose(2, 3) * scale
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        sink = sink_logits.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, sink), dim=-1)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : keys.shape[2]]
    return weights.masked_fill(~visible, 0.0) @ values


def rounding_allowed(eager: Tensor, expected: Array, terms: float = 0.0) -> float:
    """The error that a result may have against `expected`, from that of eager code.

    Twice the eager error and one rounding of the largest entry. Where an entry is a float32 sum
    whose terms cancel, `terms` is the sum of their sizes, which is what its rounding goes by.
    """
    eager_error = np.abs(exact(eager) - expected).max()
    largest = torch.finfo(eager.dtype).eps * np.abs(expected).max()
    return float(2 * (eager_error + largest + torch.finfo(torch.float32).eps * terms))
