"""Quality metrics: how far a patched model's predictions lie from a reference or from the text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fierpatch.errors import ShapeError

_ROWS_AT_ONCE = 256  # positions turned to fp64 together: 256 MB at a vocabulary of 128k


def logit_kl(reference_logits: Tensor, logits: Tensor) -> float:
    """Kullback-Leibler divergence ``KL(reference || patched)`` of the next token.

    The mean over positions of ``sum_v p_v (log p_v - log q_v)`` with p and q the softmax of the
    reference and of the patched logits (Kullback and Leibler 1951), computed in fp64. It is 0 where
    both give the same distribution, and unlike perplexity it notices every change.

    Args:
        reference_logits: ``[..., V]``, those of the dense model.
        logits: ``[..., V]``, those of the patched model at the same positions.

    Returns:
        Nats a token, at least 0; infinite where the patched model rules out a possible token.

    Raises:
        ShapeError: the shapes differ, or there is no position to compare.
    """
    if reference_logits.shape != logits.shape:
        raise ShapeError(
            f"reference_logits are {list(reference_logits.shape)} and logits "
            f"{list(logits.shape)}: give both at the same positions, [..., V]"
        )
    rows = _rows(logits)
    pairs = zip(
        _rows(reference_logits).split(_ROWS_AT_ONCE), rows.split(_ROWS_AT_ONCE), strict=True
    )
    return sum(_kl_sum(reference, patched) for reference, patched in pairs) / len(rows)


def token_agreement(a: Tensor | Sequence[int], b: Tensor | Sequence[int]) -> float:
    """Share of positions at which two token sequences are the same.

    Two generations may differ in length, because one ended early: the positions that only the
    longer one has count as disagreement.

    Args:
        a: token ids, ``[T]``, or of any shape that `b` has too.
        b: token ids, ``[T']``, or of the shape of `a`.

    Returns:
        Between 0 and 1; 1 for two empty sequences.

    Raises:
        ShapeError: the shapes differ and are not both one-dimensional.
    """
    left, right = torch.as_tensor(a), torch.as_tensor(b)
    if left.shape != right.shape and not left.ndim == right.ndim == 1:
        raise ShapeError(
            f"token ids are {list(left.shape)} and {list(right.shape)}: "
            "give equal shapes, or two sequences"
        )
    longest = max(left.numel(), right.numel())
    if longest == 0:
        return 1.0
    shared = min(len(left), len(right))
    same = left[:shared] == right[:shared].to(left.device)
    return int(same.sum()) / longest


def negative_log_likelihood(logits: Tensor, targets: Tensor | Sequence[int]) -> float:
    """Mean negative log-likelihood of the targets, computed in fp64.

    Args:
        logits: ``[..., V]``; the row at a position predicts the target at the *same* position, so
            for a text shift first: ``logits[:, :-1]`` against ``ids[:, 1:]``.
        targets: token ids, ``[...]``.

    Returns:
        Nats a token.

    Raises:
        ShapeError: `targets` do not fit `logits`, or are empty.
    """
    wanted = torch.as_tensor(targets, device=logits.device)
    if logits.shape[:-1] != wanted.shape:
        raise ShapeError(
            f"logits are {list(logits.shape)} and targets {list(wanted.shape)}: "
            "give [..., V] and [...], one row of logits a target"
        )
    rows = _rows(logits)
    pairs = zip(rows.split(_ROWS_AT_ONCE), wanted.flatten().split(_ROWS_AT_ONCE), strict=True)
    return sum(_nll_sum(some, ids) for some, ids in pairs) / len(rows)


def perplexity(logits: Tensor, targets: Tensor | Sequence[int]) -> float:
    """``exp`` of `negative_log_likelihood`: the number of equally likely tokens it amounts to.

    Args:
        logits: ``[..., V]``; the row at a position predicts the target at the same position.
        targets: token ids, ``[...]``.

    Raises:
        ShapeError: `targets` do not fit `logits`, or are empty.
    """
    return math.exp(negative_log_likelihood(logits, targets))


def _rows(logits: Tensor) -> Tensor:
    if logits.ndim == 0 or logits.numel() == 0:
        raise ShapeError(f"logits are {list(logits.shape)}: give at least one position, [..., V]")
    return logits.reshape(-1, logits.shape[-1])


def _kl_sum(reference_logits: Tensor, logits: Tensor) -> float:
    log_p = reference_logits.double().log_softmax(-1)
    log_q = logits.double().log_softmax(-1).to(log_p.device)
    p = log_p.exp()
    # A token that the reference rules out adds nothing, though its logarithms are infinite.
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    # Rounding can leave a sum just below the 0 it cannot be below.
    return float(terms.sum(-1).clamp_min(0).sum())


def _nll_sum(logits: Tensor, targets: Tensor) -> float:
    log_p = logits.double().log_softmax(-1)
    return -float(log_p.gather(-1, targets[:, None].long()).sum())
