"""What decode through retrieval selects, and what it would select by estimates of its queries."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fierpatch
from bench.prompts import Prefill
from fierpatch import FierConfig
from fierpatch.cache import LayerCache
from fierpatch.reference import index_scores, select_from_index
from fierpatch.select import attention_weights

ESTIMATES = ("previous step", "previous layer's input", "previous layer's attention")


@dataclass
class Trace:
    """What N KV heads of the sparse layers selected in T steps, each a list of K tokens."""

    selected: Tensor
    """``[T, N, K]``, ascending: the newest token is the last."""
    runners_up: Tensor
    """``[T, N, K]``, those ranked K to 2 K, the best first."""
    estimated: dict[str, Tensor]
    """``[T, N, K]``, what estimates of the query select; by their names."""
    first_layer: int
    heads_a_layer: int


class Recorder:
    """Watches decode steps of a patched Llama, layer by layer."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.layers = model.model.layers
        self.config: FierConfig = cache.settings
        self.number_of = {id(store): number for number, store in cache.stores.items()}
        self.lists: dict[str, list[Tensor]] = defaultdict(list)
        self._estimates: dict[str, dict[int, Tensor]] = {name: {} for name in ESTIMATES}
        self._angles: Any = None
        cache.observe(self)

    def __call__(
        self,
        layer: LayerCache,
        query: Tensor,
        token_indices: Tensor,
        visible: Tensor | None,
        scale: float,
        softcap: float,
    ) -> None:
        """Take down the selection of a layer, what comes behind it, and what estimates give."""
        index, config, budget = layer.index, self.config, self.config.budget
        assert index is not None
        number, length = self.number_of[id(layer)], layer.num_tokens
        scores = index_scores(index, layer.state, query, length)
        weights = attention_weights(scores, num_kv_heads=layer.keys.shape[1], scale=scale)
        weights.scatter_(3, token_indices, -1.0)
        self.lists["selected"].append(token_indices[0, :, 0])
        self.lists["runners-up"].append(weights.topk(budget).indices[0, :, 0])
        for name, estimates in self._estimates.items():
            # The first step has no query before it.
            estimate = estimates.get(number, query)
            chosen = select_from_index(
                index, layer.state, estimate, length, budget=budget, sinks=config.sinks,
                recent=config.recent, per_query_head=False, scale=scale,
            )  # fmt: skip
            self.lists[name].append(chosen[0, :, 0])
        self._estimates["previous step"][number] = query

    def hooks(self) -> list[Any]:
        """Hooks that estimate each layer's query out of the layer before it."""
        handles = []
        for number, layer in enumerate(self.layers[:-1]):

            def at_input(module: Any, args: Any, kwargs: Any, number: int = number + 1) -> None:
                self._angles = kwargs["position_embeddings"]
                query = estimated_query(self.layers[number], args[0], self._angles)
                self._estimates["previous layer's input"][number] = query

            def after_attention(module: Any, args: Any, number: int = number + 1) -> None:
                query = estimated_query(self.layers[number], args[0], self._angles)
                self._estimates["previous layer's attention"][number] = query

            handles.append(layer.register_forward_pre_hook(at_input, with_kwargs=True))
            norm = layer.post_attention_layernorm
            handles.append(norm.register_forward_pre_hook(after_attention))
        return handles

    def trace(self) -> Trace:
        """What was seen."""
        is_sparse = [n for n in self.number_of.values() if n >= self.config.dense_layers]
        lists = {
            name: torch.stack(seen).unflatten(0, (-1, len(is_sparse))).flatten(1, 2)
            for name, seen in self.lists.items()
        }
        heads = lists["selected"].shape[1] // len(is_sparse)
        estimated = {name: lists[name] for name in ESTIMATES}
        return Trace(lists["selected"], lists["runners-up"], estimated, is_sparse[0], heads)


def estimated_query(layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """The query ``[B, Hq, T, D]`` of a layer, were ``hidden [B, T, n]`` its input."""
    attention = layer.self_attn
    query = attention.q_proj(layer.input_layernorm(hidden))
    query = query.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    rotated: Tensor = apply_rotary_pos_emb(query, query, *angles)[0]
    return rotated


def record(
    model: Any, prompt: Prefill, fed: Tensor, settings: FierConfig, *, is_greedy: bool
) -> Trace:
    """Decode as many steps as ``fed [1, T]`` has tokens: these, or the model's own choice."""
    with fierpatch.apply(model, settings), torch.inference_mode():
        cache = prompt.cache_for(model, settings)
        recorder = Recorder(model, cache)
        handles = recorder.hooks()
        token = prompt.logits[:, -1:].argmax(-1)
        for step in range(fed.shape[1]):
            token = token if is_greedy else fed[:, step : step + 1]
            token = model(token, past_key_values=cache).logits.argmax(-1)
        for handle in handles:
            handle.remove()
    return recorder.trace()
