"""The kernels of a retrieval as its shape wants them: their constants and their warps."""

from __future__ import annotations

from functools import cache

import torch
import triton

from fierpatch.index import RotatedIndex
from fierpatch.index.rotation import rotation_norm
from fierpatch.kernels.attention_block import product_constants
from fierpatch.kernels.candidates import code_scores_kernel, key_scores_kernel, refine_kernel
from fierpatch.kernels.constants import EXPONENTS, MANTISSAS, MAX_HEADS
from fierpatch.kernels.launch import Specialization
from fierpatch.kernels.query import query_kernel
from fierpatch.kernels.scores import fier_scores_kernel, rotated_scores_kernel
from fierpatch.kernels.shape import CANDIDATE_TILE, CHANNELS_AT_ONCE, GROUPS_AT_ONCE, Shape
from fierpatch.kernels.top_k import (
    COARSE,
    EXACT,
    SelectionKeys,
    compact_kernel,
    key_kernel,
    low_kernel,
)

_TOKENS_PER_WARP = 512  # of the selection: what a warp does for its program costs as much as 100
_COUNTS = 8192  # of keys in bins by chunk, that a program of the compaction adds up at once
_CANDIDATES_PER_WARP = 512  # of the second selection, one program a row


def first_keys(shape: Shape) -> SelectionKeys:
    """The keys of the first selection."""
    return COARSE if shape.refine else EXACT


def _head_constants(shape: Shape) -> dict[str, int]:
    """What the query transform and the scores of the rotated index share."""
    head_dim = shape.index.head_dim
    return {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "G": shape.num_groups,
        "HEADS": shape.heads,
        "BLOCKS": shape.head_blocks,
        "GROUP": shape.index.group_size,
    }


def _channel_constants(shape: Shape) -> dict[str, int]:
    """In how many parts the query transform leaves a sum over the channels."""
    channel_blocks = triton.cdiv(shape.index.head_dim, CHANNELS_AT_ONCE)
    return {"CHANNEL_BLOCKS": channel_blocks, "BLOCK_C": triton.next_power_of_2(channel_blocks)}


@cache
def query_specialization(shape: Shape, dtype: torch.dtype, is_early: bool) -> Specialization:
    """Of `query_kernel`."""
    head_dim = shape.index.head_dim
    constants = {
        **_head_constants(shape),
        "OUT": CHANNELS_AT_ONCE,
        "GROUPS": GROUPS_AT_ONCE,
        "NORM": rotation_norm(head_dim),
        "HAS_CODES": shape.refines_by_codes,
        "SPLIT": dtype == torch.float32,
        "IS_EARLY": is_early,
    }
    num_warps = 2 if head_dim <= 128 else 4
    return Specialization(query_kernel, constants, num_warps=num_warps, is_early=is_early)


@cache
def rotated_scores_specialization(
    shape: Shape, has_mask: bool, has_cap: bool, is_early: bool
) -> Specialization:
    """Of `rotated_scores_kernel`."""
    assert isinstance(shape.index, RotatedIndex)
    constants = {
        **_head_constants(shape),
        **_channel_constants(shape),
        "BITS": shape.index.bits,
        "LISTS": shape.num_lists // shape.num_kv_heads,
        "HAS_MASK": has_mask,
        "HAS_CAP": has_cap,
        "IS_EARLY": is_early,
    }
    return Specialization(
        rotated_scores_kernel, constants, num_warps=2, num_stages=1, is_early=is_early
    )


@cache
def fier_scores_specialization(
    shape: Shape, dtype: torch.dtype, has_mask: bool, has_cap: bool
) -> Specialization:
    """Of `fier_scores_kernel`."""
    head_dim = shape.index.head_dim
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "G": shape.num_groups,
        "HEADS": MAX_HEADS.value,  # the matrix units want 8 columns
        "GROUP": shape.index.group_size,
        "LISTS": shape.num_lists // shape.num_kv_heads,
        "HAS_MASK": has_mask,
        "HAS_CAP": has_cap,
    }
    num_warps = 2 if head_dim <= 128 else 4
    return Specialization(fier_scores_kernel, constants, num_warps=num_warps, num_stages=1)


def _key_constants(keys: SelectionKeys) -> dict[str, int]:
    return {"SHIFT": keys.shift, "ALWAYS": keys.always}


@cache
def select_specializations(
    shape: Shape, has_mask: bool, sink_dtype: torch.dtype | None, is_early: bool
) -> tuple[Specialization, Specialization, Specialization]:
    """Of `key_kernel`, `low_kernel` and `compact_kernel`.

    What grows with the context is no constant, or is one in few steps: a growing cache would
    otherwise stop to compile.
    """
    heads = shape.list_heads
    block, is_coarse = {"BLOCK": shape.select_block}, {"IS_COARSE": shape.refine > 0}
    keys = {
        "G": shape.num_groups,
        "HEADS": heads,
        "BLOCK_H": triton.next_power_of_2(heads),
        **block,
        "BLOCK_TILES": 512 if shape.tiles > 256 else 256,
        **_key_constants(first_keys(shape)),
        **is_coarse,
        "HAS_MASK": has_mask,
        "HAS_SINK": sink_dtype is not None,
    }
    bins = EXPONENTS.value if shape.refine else MANTISSAS.value
    at_once = min(max(triton.next_power_of_2(shape.chunks), 8), _COUNTS // bins)
    pieces = triton.cdiv(shape.chunks, at_once)
    chunks = {"CHUNKS": at_once, "PIECES": pieces, "BLOCK_W": 1024, "BINS": bins, **is_coarse}
    num_warps = max(shape.select_block // _TOKENS_PER_WARP, 1)
    early = {"IS_EARLY": is_early}
    return (
        Specialization(key_kernel, keys | early, num_warps=num_warps, is_early=is_early),
        Specialization(low_kernel, block | early, num_warps=num_warps),
        Specialization(
            compact_kernel,
            block | chunks | early,
            num_warps=num_warps,
            is_early=is_early and not shape.refine,
        ),
    )


@cache
def code_scores_specialization(shape: Shape, has_cap: bool, is_early: bool) -> Specialization:
    """Of `code_scores_kernel`."""
    assert isinstance(shape.index, RotatedIndex)
    constants = {
        **_head_constants(shape),
        "LIST_HEADS": shape.list_heads,
        "REFINE": shape.index.refine_bits,
        "USUAL_RATIO": shape.index.refinement.usual_ratio,
        **_channel_constants(shape),
        "TILE": CANDIDATE_TILE,
        "HAS_CAP": has_cap,
        "IS_EARLY": is_early,
    }
    return Specialization(
        code_scores_kernel, constants, num_warps=1, num_stages=1, is_early=is_early
    )


@cache
def key_scores_specialization(
    shape: Shape, dtype: torch.dtype, has_cap: bool, is_early: bool
) -> Specialization:
    """Of `key_scores_kernel`."""
    head_dim = shape.index.head_dim
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "LIST_HEADS": shape.list_heads,
        "BLOCK_H": max(16, triton.next_power_of_2(shape.list_heads)),
        "LISTS_PER_KV_HEAD": shape.num_lists // shape.num_kv_heads,
        "TILE": CANDIDATE_TILE,
        **product_constants(head_dim, dtype),
        "HAS_CAP": has_cap,
        "IS_EARLY": is_early,
    }
    return Specialization(
        key_scores_kernel, constants, num_warps=4, num_stages=1, is_early=is_early
    )


@cache
def refine_specialization(
    shape: Shape, sink_dtype: torch.dtype | None, is_early: bool
) -> Specialization:
    """Of `refine_kernel`."""
    constants = {
        "HEADS": shape.list_heads,
        "BLOCK_H": triton.next_power_of_2(shape.list_heads),
        "BLOCK": shape.candidate_block,
        "PIECES": shape.candidate_blocks,
        "TILE": CANDIDATE_TILE,
        "BLOCK_W": 1024,
        **_key_constants(COARSE),
        "HAS_SINK": sink_dtype is not None,
        "IS_EARLY": is_early,
    }
    num_warps = min(max(shape.candidate_block // _CANDIDATES_PER_WARP, 1), 16)
    return Specialization(refine_kernel, constants, num_warps=num_warps, is_early=is_early)
