"""Decoding by hand: one forward pass at a time, and a place in a cache to come back to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fierpatch.hf.cache import FierCache, FierLayer


def next_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, cache: FierCache) -> Tensor:
    """The logits that follow the newest tokens, from inputs prepared as ``generate`` prepares them.

    Args:
        model: a causal LM, patched or not.
        input_ids: ``[B, T]``, the tokens that the cache does not hold yet.
        attention_mask: ``[B, S]``, 1 for every real token, those of `input_ids` included, and 0 for
            padding.
        cache: holds the ``S - T`` tokens before, and all S afterwards.

    Returns:
        ``[B, V]``.
    """
    positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
    inputs = model.prepare_inputs_for_generation(
        input_ids,
        past_key_values=cache,
        attention_mask=attention_mask,
        position_ids=positions,
        is_first_iteration=input_ids.shape[1] == attention_mask.shape[1],
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = model(**inputs, return_dict=True).logits[:, -1]
    return logits


class Bookmark:
    """A place in a `FierCache`, to come back to as often as wanted.

    Our own layers are cropped. The layers of transformers' own, which may have forgotten what a
    crop would need, are copied: they hold a window or a state, not the context.
    """

    def __init__(self, cache: FierCache) -> None:
        self._cache = cache
        self._lengths = {number: store.num_tokens for number, store in cache.stores.items()}
        self._copies = {
            number: copy.deepcopy(layer)
            for number, layer in enumerate(cache.layers)
            if not isinstance(layer, FierLayer)
        }

    def restore(self) -> None:
        """Put the cache back to where it was when this bookmark was made."""
        for number, store in self._cache.stores.items():
            store.crop(store.num_tokens - self._lengths[number])
        for number, layer in self._copies.items():
            self._cache.layers[number] = copy.deepcopy(layer)


def eos_token_ids(model: Any) -> Tensor:
    """The tokens that end a text, ``[n]``, on the model's device; n may be 0."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    listed = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return torch.tensor(listed, dtype=torch.int64, device=model.device)
