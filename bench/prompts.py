"""One dense prefill shared by many settings: the keys and queries of a prompt, indexed anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fierpatch
from fierpatch import FierCache, FierConfig

INDEXES: dict[str, dict[str, Any]] = {
    "rotated 1 bit": {"index": "rotated"},
    "rotated 2 bits": {"index": "rotated", "bits": 2},
    "fier": {"index": "fier"},
    "1 bit, refined by 2": {"refine": 4, "refine_bits": 2},
    "1 bit, refined by 4": {"refine": 4, "refine_bits": 4},
    "1 bit, refined by keys": {"refine": 4, "refine_bits": "exact"},
    "keys": {"refine": 1000, "refine_bits": "exact"},  # a candidate for every token
}


@dataclass
class Prefill:
    """A prompt's cache, the queries that each sparse layer was indexed by, and its last logits."""

    cache: FierCache
    queries: dict[int, Tensor]
    logits: Tensor

    def cache_for(self, model: Any, settings: FierConfig) -> FierCache:
        """A cache of other settings that holds the same prompt."""
        cache = FierCache(model.config, settings)
        stores = cache.stores
        for number, held in self.cache.stores.items():
            length = held.num_tokens
            stores[number].update(held.keys[:, :, :length], held.values[:, :, :length])
            if not stores[number].is_dense:
                stores[number].index_prompt(self.queries[number])
        return cache


def prefill(model: Any, ids: Tensor) -> Prefill:
    """Run a prompt ``[1, S]`` densely, with no layer left out of the index."""
    queries: dict[int, Tensor] = {}
    with fierpatch.apply(model, dense_layers=0) as handle, torch.inference_mode():
        cache = handle.new_cache()
        for number, store in cache.stores.items():

            def keep(query: Tensor, keys: Tensor, *, number: int = number) -> None:
                queries[number] = query.clone()

            store.index_prompt = keep  # type: ignore[method-assign]
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    return Prefill(cache, queries, logits)
