"""What outlives or watches a layer's cache: its numbers, and who is told of each retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fierpatch.index import nbytes

if TYPE_CHECKING:
    from fierpatch.cache.buffers import LayerBuffers
    from fierpatch.cache.layer import LayerCache


class Observer(Protocol):
    """Sees each retrieval of each layer; see `FierCache.observe`."""

    def __call__(
        self,
        layer: LayerCache,
        query: Tensor,
        token_indices: Tensor,
        visible: Tensor | None,
        scale: float,
        softcap: float,
    ) -> None:
        """Called after each retrieval, with the arguments of `LayerCache.attend`."""


@dataclass
class LayerFacts:
    """Numbers of one layer's cache that outlive its tensors, for reports."""

    counters: Tensor
    backend: str = "reference"
    batch_size: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    value_head_dim: int = 0
    itemsize: int = 0
    kv_nbytes: int = 0
    index_nbytes: int = 0
    host_nbytes: int = 0  # of those of K and V
    hot_nbytes: int = 0
    tally: Tensor | None = None  # of the hot set

    def record(self, layer: LayerBuffers) -> None:
        """Take down the layer's sizes and keep its counters."""
        keys, values = layer.keys, layer.values
        self.counters, self.backend = layer.counters, layer.operators.name
        self.batch_size, self.num_kv_heads, _, self.head_dim = keys.shape
        self.value_head_dim = values.shape[3]
        self.itemsize = keys.element_size()
        store, hot = layer.store, layer.hot
        assert store is not None
        self.kv_nbytes = store.device_nbytes + store.host_nbytes
        self.host_nbytes = store.host_nbytes
        self.hot_nbytes, self.tally = (hot.nbytes, hot.tally) if hot is not None else (0, None)
        self.index_nbytes = 0 if layer.index is None else nbytes(layer.index, layer.state)
