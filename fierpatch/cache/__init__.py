"""One layer's cache: its keys, values and index, and how far they have come."""

from __future__ import annotations

from fierpatch.cache.buffers import BUCKET_SIZE
from fierpatch.cache.facts import LayerFacts, Observer
from fierpatch.cache.layer import MARK, LayerCache
from fierpatch.cache.shared import Shared

__all__ = ["BUCKET_SIZE", "MARK", "LayerCache", "LayerFacts", "Observer", "Shared"]
