"""FierCache: the cache handed to transformers, with our layers in the layout it chooses itself."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from fierpatch.cache import LayerCache, LayerFacts, Observer, Shared
from fierpatch.config import FierConfig
from fierpatch.errors import CacheMismatchError, PositionLimitError
from fierpatch.hf.support import max_positions
from fierpatch.offload import MemoryPool


class FierLayer(CacheLayerMixin):
    """A `LayerCache` in the shape that transformers expects of a cache layer."""

    is_sliding = False
    is_croppable = True

    def __init__(self, store: LayerCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store
        self.is_compileable = store.is_static

    @property
    def batch_size(self) -> int:
        """Rows of the batch, or -1 before the first update."""
        return self.store.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for tensors shaped like these."""
        self.store.allocate(key_states, value_states)
        self._refresh()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens; see `LayerCache.update`."""
        result = self.store.update(key_states, value_states)
        self._refresh()
        return result

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The key length that `update` will return for this many queries, and offset 0."""
        return self.store.mask_length(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens stored: an int, or a 0-d device tensor where the cache is static."""
        if not self.store.is_static:
            return self.store.num_tokens
        if not self.store.is_allocated:
            return 0
        # A copy, because the counter moves on while the step still needs this value.
        length: int = self.store.counters[0].clone()  # type: ignore[assignment]
        return length

    def get_max_length(self) -> int:
        """The capacity of a static layer, -1 for one that grows."""
        return self.store.capacity if self.store.is_static else -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens (a positive value: keep that many)."""
        removed = -tokens_to_remove
        if tokens_to_remove > 0:
            removed = max(self.store.num_tokens - tokens_to_remove, 0)
        self.store.crop(removed)

    def reset(self) -> None:
        """Forget every token, keep the buffers."""
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search, in place."""
        self.store.take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(max(self.store.batch_size, 0))
        self.store.take(rows.repeat_interleave(repeats))
        self._refresh()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self.store.take(indices)
        self._refresh()

    def _refresh(self) -> None:
        # transformers reads these of any layer.
        self.is_initialized = self.store.is_allocated
        if self.is_initialized:
            self.keys, self.values = self.store.keys, self.store.values
            self.dtype, self.device = self.store.keys.dtype, self.store.keys.device


class Lease:
    """Held by a cache over pooled layers: they are in use for as long as it lives."""


class FierCache(Cache):
    """A cache whose plain full-attention layers carry a key index.

    transformers lays out the layers; only those whose type is plain are replaced. Sliding, chunked
    and linear layers stay its own.

    Args:
        config: the model's configuration.
        settings: the settings of the patch; None means the defaults.
        max_cache_len: tokens to make room for at first, or for good where
            ``settings.compile`` is True.
        memory: where memory of the host comes from and goes back to, for offloaded layers; None
            means that it ends with the cache.

    Raises:
        PositionLimitError: a static cache longer than the model has positions.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        settings: FierConfig | None = None,
        *,
        max_cache_len: int = 0,
        memory: MemoryPool | None = None,
    ) -> None:
        settings = settings or FierConfig()
        text_config = config.get_text_config(decoder=True)
        limit = max_positions(text_config)
        if settings.compile and limit is not None and max_cache_len > limit:
            raise PositionLimitError(
                f"a static cache of {max_cache_len} tokens is past the model's {limit} positions: "
                "shorten the prompt or generate fewer tokens"
            )
        self.settings = settings
        self.lease: Lease | None = None  # a shallow copy of the cache shares it, as the layers
        self.model_type = text_config.model_type
        capacity = -(-max(max_cache_len, 1) // 512) * 512
        template: Cache
        plain: type[CacheLayerMixin]
        if settings.compile:
            template, plain = StaticCache(text_config, capacity), StaticLayer
        else:
            template, plain = DynamicCache(config=text_config), DynamicLayer
        layers = list(template.layers)
        self._shared = Shared(memory=memory or MemoryPool())
        for number, layer in enumerate(layers):
            if type(layer) is plain:
                layers[number] = FierLayer(
                    LayerCache(
                        settings,
                        capacity=max_cache_len,
                        is_static=settings.compile,
                        is_dense=number < settings.dense_layers,
                        max_positions=limit,
                        shared=self._shared,
                    )
                )
        for before, after in pairwise(layers):
            if isinstance(before, FierLayer) and isinstance(after, FierLayer):
                before.store.next, after.store.has_previous = weakref.ref(after.store), True
        super().__init__(layers=layers)

    @property
    def stores(self) -> dict[int, LayerCache]:
        """Our layers by their number in the model."""
        return {
            number: layer.store
            for number, layer in enumerate(self.layers)
            if isinstance(layer, FierLayer)
        }

    @property
    def facts(self) -> dict[int, LayerFacts]:
        """Numbers of our layers that outlive the cache, for reports."""
        return {number: store.facts for number, store in self.stores.items()}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens of one layer.

        Raises:
            CacheMismatchError: the model has more layers than the cache was built for.
            BackendError: the backend asked for cannot run on such keys and values.
        """
        if layer_idx >= len(self.layers):
            raise CacheMismatchError(
                f"layer {layer_idx} was asked of a cache of {len(self.layers)} layers built for a "
                f"{self.model_type!r} model: it belongs to another model; start with a new cache"
            )
        if layer_idx == 0 and not getattr(self.layers[0], "is_initialized", True):
            # Our layers ask too, but a sliding one before them would have stored by then.
            self._shared.operators(self.settings, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def observe(self, observer: Observer | None) -> None:
        """Call `observer` at each retrieval of each layer; None stops it."""
        for store in self.stores.values():
            store.observer = observer

    def check_model(self, config: PreTrainedConfig, batch_size: int | None = None) -> None:
        """Check before anything changes that this cache is for that model and batch.

        Raises:
            CacheMismatchError: it is not.
        """
        text_config = config.get_text_config(decoder=True)
        num_layers = len(DynamicCache(config=text_config).layers)
        if text_config.model_type != self.model_type or num_layers != len(self.layers):
            raise CacheMismatchError(
                f"the cache was built for a {self.model_type!r} model of {len(self.layers)} layers "
                f"and given to a {text_config.model_type!r} model of {num_layers}: start with a "
                "new cache"
            )
        held = self.batch_size
        if batch_size is not None and held > 0 and held != batch_size:
            raise CacheMismatchError(
                f"the cache holds a batch of {held} and was given one of {batch_size}: start with "
                "a new cache, or select rows with batch_select_indices"
            )

    @property
    def is_compileable(self) -> bool:
        """Whether decode with this cache compiles: only where the settings ask for it."""
        return self.settings.compile and all(layer.is_compileable for layer in self.layers)
