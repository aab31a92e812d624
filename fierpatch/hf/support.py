"""Which models can be patched, and the reason where one cannot."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fierpatch.errors import ModelError, TrainingModeError, UnsupportedModelError

# The base implementations whose masks we know how to make and hand on.
BASE_IMPLEMENTATIONS = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)

# Decoders whose attention goes through the interface, but not with what the cache returned.
_ALTERED = {
    "diffllama": "splits its values in two and repeats each half",
    "doge": "adds a learned mask of its own to every head",
    "jetmoe": "repeats keys and values once for each expert",
    "mllama_text_model": "reads the keys and values of images straight from the cache",
}


def unwrap(model: object) -> PreTrainedModel:
    """The transformers model inside compiled, data-parallel and PEFT wrappers.

    Raises:
        ModelError: there is none.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        modules = getattr(inner, "_modules", {})
        if "_orig_mod" in modules:  # torch.compile
            inner = modules["_orig_mod"]
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif "module" in modules:  # DataParallel, DistributedDataParallel
            inner = modules["module"]
        else:
            raise ModelError(
                f"expected a transformers PreTrainedModel or a wrapper of one, got "
                f"{type(model).__name__}: load it with AutoModelForCausalLM.from_pretrained"
            )
    return inner


def check_model(model: PreTrainedModel) -> None:
    """Raise before anything changes if the model cannot be patched.

    Raises:
        UnsupportedModelError: not a decoder, no generate, MLA, or attention that bypasses the
            interface.
        TrainingModeError: it is in training mode.
    """
    name = type(model).__name__
    text_config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: fierpatch patches decoder-only causal language models"
        )
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{name} cannot generate: load the model with AutoModelForCausalLM"
        )
    if getattr(text_config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention (kv_lora_rank="
            f"{text_config.kv_lora_rank}): its cache holds latents, which the key index cannot "
            "score; run it unpatched"
        )
    if not model._can_set_attn_implementation() or _bypasses_interface(model):
        raise UnsupportedModelError(
            f"{name} computes attention in its own module and bypasses transformers' "
            "AttentionInterface, where the patch goes: run it unpatched"
        )
    generative: Any = model  # its generation methods come from a mixin
    if not generative._supports_default_dynamic_cache():
        raise UnsupportedModelError(
            f"{name} brings a cache of its own instead of transformers' default: run it unpatched"
        )
    if text_config.model_type in _ALTERED:
        raise UnsupportedModelError(
            f"{name} {_ALTERED[text_config.model_type]}, so retrieval would not be what it "
            "computes: run it unpatched"
        )
    if "llama4" in text_config.model_type:
        raise UnsupportedModelError(
            f"{name} mixes chunked layers that share masks with full ones: run it unpatched"
        )
    base = text_config._attn_implementation or "eager"
    if base.startswith("fier|"):
        raise UnsupportedModelError(
            f"{name} shares its configuration object with a model that is patched: give each model "
            "its own, by building it from copy.deepcopy(config)"
        )
    if base not in BASE_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name} runs attn_implementation={base!r}: choose one of "
            f"{', '.join(BASE_IMPLEMENTATIONS)} with model.set_attn_implementation first"
        )
    if all(layer.kind != "full" for layer in layer_layout(text_config)):
        raise UnsupportedModelError(
            f"{name} has no full-attention layer: there is nothing for retrieval to do"
        )
    if model.training:
        raise TrainingModeError(
            f"{name} is in training mode, where retrieval has no backward: call model.eval() first"
        )


def _bypasses_interface(model: PreTrainedModel) -> bool:
    """Whether a module stores keys in the cache and then attends by code of its own.

    transformers' own check looks at the file, where the interface may serve a vision tower alone.
    """
    for cls in {type(module) for module in model.modules()}:
        if cls.__module__.startswith("torch."):
            continue
        try:
            source = inspect.getsource(cls.forward)
        except (OSError, TypeError):  # written in a console, say
            continue
        if re.search(r"\.update\(\s*k", source) and "ALL_ATTENTION_FUNCTIONS" not in source:
            return True
    return False


@dataclass(frozen=True)
class LayerLayout:
    """What transformers itself would cache for one layer.

    `kind` is ``"full"``, ``"sliding"`` or ``"other"``; `window` is the tokens a sliding layer sees.
    """

    kind: str
    window: int | None
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


def layer_layout(text_config: PreTrainedConfig) -> list[LayerLayout]:
    """The layout that transformers chooses for the cache of a decoder."""
    layout = []
    for number, layer in enumerate(DynamicCache(config=text_config).layers):
        config = text_config
        if text_config.is_heterogeneous:
            config = text_config.per_layer_config[number]
        num_heads = getattr(config, "num_attention_heads", None) or 1  # none in pure Mamba
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        window = getattr(layer, "sliding_window", None)
        kind = "full" if type(layer) is DynamicLayer else "sliding" if window else "other"
        layout.append(LayerLayout(kind, window, num_heads, num_kv_heads, head_dim))
    return layout


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every distinct configuration object that the decoder's modules read."""
    text_config = model.config.get_text_config(decoder=True)
    found: dict[int, PreTrainedConfig] = {id(text_config): text_config}
    modules: list[nn.Module] = list(model.modules())
    for module in modules:
        config = getattr(module, "config", None)
        if type(config) is type(text_config):
            found.setdefault(id(config), config)
    return list(found.values())


def max_positions(text_config: PreTrainedConfig) -> int | None:
    """Tokens the model has positions for; None where it states no limit or stretches to fit."""
    limit = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if not isinstance(limit, int) or limit <= 0 or rope.get("rope_type") == "dynamic":
        return None
    return limit
