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
        for tensor in (self.factors, self.estimate, self.noise, *self.queries):
            torch._dynamo.mark_static_address(tensor)
        self.stores = stores
        for store, query in zip(stores, self.queries, strict=True):
            store.attend = _Turned(self, store, query)  # type: ignore[method-assign]
            store.prefetch = _Estimated(self, store, query)  # type: ignore[method-assign]

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

    def __init__(self, drift: Drift, store: LayerCache, query: Tensor) -> None:
        self.drift, self.store, self.query = drift, store, query

    def __call__(self, estimate: QueryEstimate) -> None:
        drift, number = self.drift, self.store.counters[:1] + 1
        noise, error = (
            drift.noise.index_select(0, (number + place) % NUM_NOISES)[0]
            for place in (0, NUM_NOISES // 2)
        )
        coming = drift.factors[0] * self.query + drift.factors[1] * noise
        guess = (drift.estimate[0] * coming + drift.estimate[1] * error).to(estimate.source.dtype)
        source = 1e-6 * estimate.source
        if estimate.rotation is None:
            made = QueryEstimate(guess + source)
        else:
            identity = torch.eye(guess.shape[3], dtype=guess.dtype, device=guess.device)
            rotation = identity + 1e-6 * estimate.rotation
            made = QueryEstimate(source, estimate.weight, guess.flatten(), rotation)
        LayerCache.prefetch(self.store, made)


class _Turned:
    """`LayerCache.attend` with the drifting query."""

    def __init__(self, drift: Drift, store: LayerCache, query: Tensor) -> None:
        self.drift, self.store, self.query = drift, store, query

    def __call__(self, query: Tensor, **options: Any) -> Tensor | None:
        factors, noise = self.drift.factors, self.drift.noise
        number = self.store.counters[:1] % NUM_NOISES
        turned = factors[0] * self.query + factors[1] * noise.index_select(0, number)[0]
        self.query.copy_(turned)
        return LayerCache.attend(self.store, turned.to(query.dtype) + 1e-6 * query, **options)
