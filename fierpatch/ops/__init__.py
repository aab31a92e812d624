"""The operators: validated functions for researchers, and the library ops that models call."""

from __future__ import annotations

from fierpatch.ops import library as library  # registers torch.ops.fierpatch
from fierpatch.ops.functional import (
    append_keys,
    build_index,
    index_scores,
    retrieval_attention,
)
from fierpatch.reference import attention_mass, gather_attention, masked_attention
from fierpatch.select import select

__all__ = [
    "append_keys",
    "attention_mass",
    "build_index",
    "gather_attention",
    "index_scores",
    "masked_attention",
    "retrieval_attention",
    "select",
]
