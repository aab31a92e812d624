"""Models with random weights and caches with random contents: a long context without a prefill."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Llama 3.1 8B, and one that a test can wait for.
SHAPES: dict[str, dict[str, int]] = {
    "llama-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}

CALIBRATION_WINDOW = 4096  # newest queries; an index looks at no older ones


def random_llama(shape: str, device: str, num_layers: int | None = None) -> Any:
    """A model with random weights; bfloat16, or float32 on a CPU, which is slow at bfloat16.

    Args:
        shape: a name out of `SHAPES`.
        device: where its weights are made.
        num_layers: fewer layers than the shape has, for a dry run.
    """
    # No token ends a text: which one a random model likes best must not matter.
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 20, eos_token_id=None)
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def fill(model: Any, cache: Any, length: int) -> None:
    """Random keys and values in every layer, and the index of our layers calibrated and built."""
    config, generator = model.config, torch.Generator(model.device).manual_seed(0)
    head_dim = config.hidden_size // config.num_attention_heads
    num_groups = config.num_attention_heads // config.num_key_value_heads
    for number in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, head_dim)
        key, value = (
            torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device)
            for _ in range(2)
        )
        keys, _ = cache.update(key, value, number)
        store = getattr(cache.layers[number], "store", None)
        if store is not None and not store.is_dense:
            newest = key[:, :, -CALIBRATION_WINDOW:]
            store.index_prompt(newest.repeat_interleave(num_groups, 1), keys)
