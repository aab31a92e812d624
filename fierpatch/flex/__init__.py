"""FlexAttention: masks by name, block masks from a selection, decode and prefill over both."""

from __future__ import annotations

from fierpatch.flex.attention import Mode, selected_attention
from fierpatch.flex.block_mask import BLOCK_SIZES, block_mask_of, ordered_blocks
from fierpatch.flex.blocks import Span
from fierpatch.flex.limits import check_layer
from fierpatch.flex.masks import (
    MaskMod,
    QueryLayout,
    causal_mask_mod,
    padding_mask_mod,
    selected_blocks_mask_mod,
    selected_mask_mod,
    sinks_and_recent_mask_mod,
)
from fierpatch.flex.operators import FlexOperators
from fierpatch.flex.prefill import (
    BlockObserver,
    PrefillSettings,
    estimated_keys,
    sparse_attention,
)
from fierpatch.flex.selection import SelectionMask
from fierpatch.flex.span_attention import Operands

__all__ = [
    "BLOCK_SIZES",
    "BlockObserver",
    "FlexOperators",
    "MaskMod",
    "Mode",
    "Operands",
    "PrefillSettings",
    "QueryLayout",
    "SelectionMask",
    "Span",
    "block_mask_of",
    "causal_mask_mod",
    "check_layer",
    "estimated_keys",
    "ordered_blocks",
    "padding_mask_mod",
    "selected_attention",
    "selected_blocks_mask_mod",
    "selected_mask_mod",
    "sinks_and_recent_mask_mod",
    "sparse_attention",
]
