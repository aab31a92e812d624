"""FlexAttention as a backend: masks by name, block masks from a selection, and decode over both."""

from __future__ import annotations

from fierpatch.flex.block_mask import (
    BLOCK_SIZES,
    SelectionMask,
    block_mask_of,
    ordered_blocks,
)
from fierpatch.flex.masks import (
    MaskMod,
    QueryLayout,
    causal_mask_mod,
    padding_mask_mod,
    selected_blocks_mask_mod,
    selected_mask_mod,
    sinks_and_recent_mask_mod,
)

__all__ = [
    "BLOCK_SIZES",
    "MaskMod",
    "QueryLayout",
    "SelectionMask",
    "block_mask_of",
    "causal_mask_mod",
    "ordered_blocks",
    "padding_mask_mod",
    "selected_blocks_mask_mod",
    "selected_mask_mod",
    "sinks_and_recent_mask_mod",
]
