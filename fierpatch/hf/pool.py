"""One set of static layers that every `generate` of a patch uses again, at the same addresses."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

from fierpatch.config import FierConfig
from fierpatch.hf.cache import FierCache, FierLayer, Lease


@dataclass(frozen=True)
class Demand:
    """What decides the shape, type and place of the keys that a `generate` will store.

    Two runs of equal demands can use the same layers, whatever their lengths.
    """

    settings: FierConfig
    rows: int
    placement: tuple[tuple[torch.dtype, torch.device], ...]
    autocast: torch.dtype | None

    @classmethod
    def of(cls, model: Any, settings: FierConfig, rows: int) -> Demand:
        """The demand of a run of this model over a batch of so many rows."""
        # Every parameter, because a model may be spread over devices, and moved between runs.
        placement = tuple((each.dtype, each.device) for each in model.parameters())
        kind = model.device.type
        is_cast = torch.is_autocast_enabled(kind)
        return cls(settings, rows, placement, torch.get_autocast_dtype(kind) if is_cast else None)


class StaticPool:
    """The static layers of a patch, lent to one cache at a time.

    A captured CUDA graph is bound to the addresses it was captured with, so a new cache for every
    run would mean a new graph for every run. The pool lends its layers again, reset, once the
    cache that had them last is gone. A cache that is still there, because its owner wants another
    turn of it or another thread generates, keeps its layers for good, and the pool starts anew.

    Whoever keeps the keys of a lent cache, but not the cache, sees them change with the next run.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._layers: tuple[CacheLayerMixin, ...] = ()
        self._demand: Demand | None = None
        self._num_tokens = 0
        self._lease: weakref.ref[Lease] | None = None

    def lend(self, demand: Demand, num_tokens: int, make: Callable[[int], FierCache]) -> FierCache:
        """A cache with room for `num_tokens`, empty, over the pooled layers where they fit.

        Layers of a longer run serve a shorter one. Where the pooled layers do not fit, their memory
        is released before new ones take their place.

        Args:
            demand: of this run.
            num_tokens: the length the cache must have room for.
            make: a new cache, not allocated yet, with room for so many tokens.
        """
        with self._lock:
            if not self._is_idle():
                self._forget()
            cache = self._lend_again(demand, num_tokens, make)
            if cache is None:
                cache = make(num_tokens)
                layers = _resettable(cache)
                if len(layers) < len(cache.layers):
                    return cache
                self._release()
                self._layers, self._demand, self._num_tokens = layers, demand, num_tokens
            cache.lease = Lease()
            self._lease = weakref.ref(cache.lease)
            return cache

    def drop(self) -> None:
        """Give the memory back; a cache that is still in use keeps its own."""
        with self._lock:
            if self._is_idle():
                self._release()
            self._forget()

    def _lend_again(
        self, demand: Demand, num_tokens: int, make: Callable[[int], FierCache]
    ) -> FierCache | None:
        if not self._layers or demand != self._demand:
            return None
        longest = max(num_tokens, self._num_tokens)
        cache = make(longest)
        if not self._fits(cache, demand.rows):
            return None
        self._num_tokens = longest
        cache.layers = list(self._layers)
        for layer in self._layers:
            _reset(layer)
        return cache

    def _forget(self) -> None:
        self._layers, self._demand, self._num_tokens, self._lease = (), None, 0, None

    def _is_idle(self) -> bool:
        lease = self._lease
        if lease is None or lease() is None:
            return True
        # The compiler leaves the cache it has traced in a cycle. To collect takes a fraction of a
        # second; not to would cost a second set of keys and values, and a second graph.
        gc.collect()
        return lease() is None

    def _fits(self, cache: FierCache, rows: int) -> bool:
        """Whether the pooled layers are what this cache would allocate for itself."""
        wanted = _resettable(cache)
        return len(wanted) == len(self._layers) and all(
            _signature(own) == _signature(new) and _is_usable(own, rows)
            for own, new in zip(self._layers, wanted, strict=True)
        )

    def _release(self) -> None:
        for layer in self._layers:
            if isinstance(layer, FierLayer):
                layer.store.release()
                layer.keys = layer.values = None
                continue
            for tensor in _buffers(layer):
                # From the tensor itself, because a graph or the compiler may hold it still. Not by
                # resizing its storage: that would pull the memory from under any view of it.
                with torch.inference_mode(tensor.is_inference()):
                    tensor.set_()  # type: ignore[call-overload]


def _resettable(cache: FierCache) -> tuple[CacheLayerMixin, ...]:
    """The layers whose reset leaves no trace of a run; one of linear attention keeps its mode."""
    kinds = FierLayer, StaticLayer, StaticSlidingWindowLayer
    return tuple(
        layer
        for layer in cache.layers
        if isinstance(layer, CacheLayerMixin) and type(layer) in kinds
    )


def _signature(layer: CacheLayerMixin) -> tuple[object, ...]:
    """What two layers must share to stand in for each other."""
    shared = type(layer), layer.get_max_length()
    if isinstance(layer, FierLayer):
        store = layer.store
        return *shared, store.config, store.is_dense, store.max_positions
    return shared


def _is_usable(layer: CacheLayerMixin, rows: int) -> bool:
    """Whether its buffers, if any, are those of so many rows and may be written to here."""
    # transformers' own layers may have been allocated in inference mode, for good.
    written = [*_buffers(layer), getattr(layer, "cumulative_length", None)]
    is_writable = torch.is_inference_mode_enabled() or not any(
        tensor.is_inference() for tensor in written if isinstance(tensor, Tensor)
    )
    return is_writable and (layer.keys is None or layer.keys.shape[0] == rows)


def _reset(layer: CacheLayerMixin) -> None:
    layer.reset()
    if isinstance(layer, FierLayer):
        layer.store.observer, layer.store.hands_out_all = None, False
    else:
        # Beam search replaces the tensors of transformers' own layers, by some without a mark.
        for tensor in _buffers(layer):
            torch._dynamo.mark_static_address(tensor)


def _buffers(layer: CacheLayerMixin) -> Iterator[Tensor]:
    """The tensors that grow with the capacity; not the counters, which reports go on to read."""
    if isinstance(layer, FierLayer):
        yield from layer.store.buffers
    elif layer.keys is not None and layer.values is not None:
        yield from (layer.keys, layer.values)
