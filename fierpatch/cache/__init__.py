"""One layer's cache: its keys, values and index, and how far they have come."""

from __future__ import annotations

from fierpatch.cache.buffers import BUCKET_SIZE
from fierpatch.cache.facts import LayerFacts
from fierpatch.cache.layer import MARK, LayerCache, Observer
from fierpatch.cache.shared import Shared

__all__ = ["BUCKET_SIZE", "MARK", "LayerCache", "LayerFacts", "Observer", "Shared"]
