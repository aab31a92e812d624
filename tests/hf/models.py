"""Tiny random models of the families that the tests patch, and prompts for them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 128
PAD_TOKEN = 0
MAX_POSITIONS = 2048
WINDOW = 32  # tokens a sliding layer sees: far fewer than a prompt has

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    # Wide enough that attention decides the next token, and no two logits are nearly equal.
    "initializer_range": 0.25,
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": 1,
    "eos_token_id": None,  # every run is as long as it was asked to be
    "use_cache": True,
}
_MIXED = ["sliding_attention", "full_attention"] * 2
_FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral_sliding": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "tie_word_embeddings": False,  # tied, they repeat the prompt's last token for ever
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "sliding_window": WINDOW,
            "num_hidden_layers": 6,
            "layer_types": [*_MIXED, "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}

FAMILIES = tuple(name for name in _FAMILIES if name != "mistral_sliding")
# Each with the base implementations it has: GPT-OSS has no SDPA, for its attention sinks, nor has
# Gemma 2 in newer releases of transformers, for its softcapping.
FAMILIES_AND_BASES = tuple(
    (family, base)
    for family in FAMILIES
    for base in ("sdpa", "eager")
    if base == "eager" or _FAMILIES[family][1]._supports_sdpa
)


def tiny_model(family: str, base: str | None = None, **changes: Any) -> PreTrainedModel:
    """A fresh model in eval mode, equal to any other of the same arguments.

    Args:
        family: one of `FAMILIES`, or ``"mistral_sliding"``, which has no full-attention layer.
        base: the attention implementation; None means the family's default.
        **changes: fields of the configuration.
    """
    frozen = tuple(sorted((name, _freeze(value)) for name, value in changes.items()))
    return copy.deepcopy(_built(family, base, frozen))


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of such a model."""
    config_class, _, fields = _FAMILIES[family]
    return config_class(**{**_SIZES, **fields, **changes})


def prompt(length: int, batch_size: int = 1, seed: int = 0) -> Tensor:
    """Random token ids ``[B, length]`` without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (batch_size, length), generator=generator)


def left_padded(length: int, pads: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of ``len(pads)`` rows, row i starting with ``pads[i]`` padding tokens."""
    input_ids = prompt(length, len(pads), seed)
    mask = torch.arange(length)[None] >= torch.tensor(pads)[:, None]
    return {
        "input_ids": input_ids.masked_fill(~mask, PAD_TOKEN),
        "attention_mask": mask.long(),
    }


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _built(family: str, base: str | None, changes: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in changes}
    config = tiny_config(family, **fields)
    if base is not None:
        config._attn_implementation = base
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: PreTrainedModel = _FAMILIES[family][1](config).eval()
    # A sampling default would only warn where a test asks for greedy decoding.
    model.generation_config.do_sample = False
    return model
