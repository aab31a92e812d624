"""What outlives or watches a layer's cache: its numbers, and who is told of each retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
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
