"""FlexAttention: block masks from the index, and attention under them."""

from __future__ import annotations

from fierpatch.flex.blocks import Span
from fierpatch.flex.prefill import (
    BlockObserver,
    PrefillSettings,
    estimated_keys,
    sparse_attention,
)

__all__ = ["BlockObserver", "PrefillSettings", "Span", "estimated_keys", "sparse_attention"]
