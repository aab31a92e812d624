"""Queries that turn by as much as asked a step, so that consecutive selections overlap as asked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fierpatch.cache import LayerCache
from fierpatch.query_estimate import QueryEstimate

NUM_NOISES = 64  # different turns, one after the other
CALIBRATIONS = 10  # halvings of an interval of correlations


class Drift:
    """Stands in for the queries of every sparse layer of a cache that is filled.

    The next query is ``a q + b n`` for a Gaussian n, with ``a^2 + b^2 = 1``. The model's own query
    is added a millionth, so that the work for it is done.

    Args:
        stores: the sparse layers.
        num_heads: query heads.
    """

    def __init__(self, stores: list[LayerCache], num_heads: int) -> None:
        keys = stores[0].keys
        shape = (1, num_heads, 1, keys.shape[3])
        self.scale = keys.shape[3] ** -0.5
        self.factors = torch.tensor([1.0, 0.0], device=keys.device)
        self.noise = torch.randn(NUM_NOISES, *shape, device=keys.device)
        self.queries = [torch.randn(shape, device=keys.device) for _ in stores]
        self.estimate = torch.tensor([1.0, 0.0], device=keys.device)
        # Of the layers' next queries, without RoPE, whose matrix would be made once a step.
        self.guesses = [query.flatten().to(keys.dtype, copy=True) for query in self.queries]
        self.unturned = torch.eye(shape[3], dtype=keys.dtype, device=keys.device)[None]
        tensors = self.factors, self.estimate, self.noise, self.unturned
        for tensor in (*tensors, *self.queries, *self.guesses):
            torch._dynamo.mark_static_address(tensor)
        self.stores = stores
        for store, query, guess in zip(stores, self.queries, self.guesses, strict=True):
            store.attend = _Turned(self, store, query, guess)  # type: ignore[method-assign]
            store.prefetch = _Estimated(self, store, guess)  # type: ignore[method-assign]

    def turn_for(self, overlap: float) -> float:
        """Turn from now on so that this share of a selection is in the next; returns the share."""
        return self._set(self.factors, overlap)

    def estimate_for(self, share: float) -> float:
        """Estimate queries from now on so that this share of a selection is found so."""
        return self._set(self.estimate, share)

    def _set(self, factors: Tensor, overlap: float) -> float:
        low, high, found = 0.0, 1.0, 0.0
        for _ in range(CALIBRATIONS):
            middle = (low + high) / 2
            found = self._overlap(middle)
            low, high = (middle, high) if found < overlap else (low, middle)
        if overlap <= 0:
            low = 0.0
            found = self._overlap(0.0)
        factors.copy_(torch.tensor([low, _other(low)]))
        return found

    def _overlap(self, correlation: float) -> float:
        store, query = self.stores[0], self.queries[0]
        turn = _other(correlation)
        shared = total = 0
        for noise in self.noise[:4]:
            lists = []
            for each in (query, correlation * query + turn * noise):
                chosen = store.operators.retrieve(
                    each.to(store.keys.dtype), store.store.rows, store.state, store.counters,
                    None, None, self.scale, 0.0,
                )  # fmt: skip
                lists.append(chosen.flatten(0, 2).tolist())
            for one, other in zip(*lists, strict=True):
                shared += len(set(one) & set(other))
                total += len(set(one))
        return shared / total


def _other(correlation: float) -> float:
    """The factor of the noise."""
    return math.sqrt(max(1 - correlation * correlation, 0.0))


class _Estimated:
    """`LayerCache.prefetch` with an estimate of the drifting query's next value."""

    def __init__(self, drift: Drift, store: LayerCache, guess: Tensor) -> None:
        self.drift, self.store, self.guess = drift, store, guess

    def __call__(self, estimate: QueryEstimate) -> None:
        source = 1e-6 * estimate.source
        if estimate.weight is None:
            made = QueryEstimate(self.guess.view(estimate.size) + source)
        else:
            made = QueryEstimate(source, estimate.weight, self.guess, self.drift.unturned)
        LayerCache.prefetch(self.store, made)


class _Turned:
    """`LayerCache.attend` with the drifting query; guesses the next one, if that is wanted."""

    def __init__(self, drift: Drift, store: LayerCache, query: Tensor, guess: Tensor) -> None:
        self.drift, self.store, self.query, self.guess = drift, store, query, guess

    def __call__(self, query: Tensor, **options: Any) -> Tensor | None:
        drift = self.drift
        turned = drift.factors[0] * self.query + drift.factors[1] * self._noise(0)
        if self.store.config.prefetch:
            coming = drift.factors[0] * turned + drift.factors[1] * self._noise(1)
            guess = drift.estimate[0] * coming + drift.estimate[1] * self._noise(NUM_NOISES // 2)
            self.guess.copy_(guess.flatten())
        self.query.copy_(turned)
        return LayerCache.attend(self.store, turned.to(query.dtype) + 1e-6 * query, **options)

    def _noise(self, ahead: int) -> Tensor:
        """Of this step, or of one so many steps later."""
        number = (self.store.counters[:1] + ahead) % NUM_NOISES
        return self.drift.noise.index_select(0, number)[0]
