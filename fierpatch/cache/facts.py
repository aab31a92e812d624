"""The numbers of a layer's cache that outlive it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fierpatch.hot_set import HotSet
from fierpatch.offload import Store


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

    def record(
        self,
        store: Store,
        hot: HotSet | None,
        *,
        counters: Tensor,
        backend: str,
        index_nbytes: int,
    ) -> None:
        """Take down the sizes of what a layer holds, and keep its counters and tally."""
        keys, values = store.keys, store.values
        self.counters, self.backend = counters, backend
        self.batch_size, self.num_kv_heads, _, self.head_dim = keys.shape
        self.value_head_dim = values.shape[3]
        self.itemsize = keys.element_size()
        self.kv_nbytes = store.device_nbytes + store.host_nbytes
        self.host_nbytes = store.host_nbytes
        self.hot_nbytes, self.tally = (hot.nbytes, hot.tally) if hot is not None else (0, None)
        self.index_nbytes = index_nbytes
