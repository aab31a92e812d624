"""Model folders: loading a causal LM with its tokenizer, and making a folder of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fierpatch.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WANTED = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}
_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def load(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM, in evaluation mode, and its tokenizer.

    Args:
        path_or_id: a folder that holds ``config.json``, weights and tokenizer, or a hub id.
        dtype: type of the weights; None keeps the one they are stored in.
        device: where the model goes; None means the CPU.

    Raises:
        CheckpointError: the folder or id has no causal LM with a tokenizer that can be loaded.

    Example:
        >>> model, tokenizer = load("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = _checked_name(path_or_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"no causal LM with its tokenizer could be loaded from {name!r}: {error} Give a folder "
            "written by save_pretrained, or the id of a model on the Hugging Face hub"
        ) from error
    if device is not None:
        model.to(device)  # type: ignore[arg-type]  # mypy loses `self` in its decorator
    return model.eval(), tokenizer


def load_config(path_or_id: str | Path) -> PreTrainedConfig:
    """Load the configuration alone.

    Args:
        path_or_id: as in `load`; of a folder only ``config.json`` is read.

    Raises:
        CheckpointError: the folder or id has no configuration that transformers knows.
    """
    from transformers import AutoConfig

    name = _checked_name(path_or_id)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no configuration could be loaded from {name!r}: {error} Give a folder written by "
            "save_pretrained, or the id of a model on the Hugging Face hub"
        ) from error
    return config


def convert_gguf(gguf_path: str | Path, out_dir: str | Path) -> Path:
    """Make a plain model folder of a SmolLM2 GGUF file.

    The folder holds ``config.json``, ``generation_config.json``, ``model.safetensors``,
    ``tokenizer.json`` and ``tokenizer_config.json``; to load it takes neither gguf nor accelerate.
    Weights are dequantised to fp32 and rounded to bf16, so the logits are those of
    ``from_pretrained(..., gguf_file=...)`` up to that rounding.

    Args:
        gguf_path: a GGUF file of the Llama architecture with the tokenizer of SmolLM.
        out_dir: the folder to write, made where it is missing.

    Returns:
        `out_dir`.

    Raises:
        MissingDependencyError: gguf is not installed.
        CheckpointError: the file is no GGUF, or holds another architecture or tokenizer.
    """
    reader = _open_gguf(Path(gguf_path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    for name, wanted in _WANTED.items():
        if metadata.get(name) != wanted:
            raise CheckpointError(
                f"{gguf_path} has {name} = {metadata.get(name)!r}, wanted {wanted!r}: only SmolLM2 "
                "can be converted; give other models as a folder or hub id"
            )
    weights = _weights(reader, metadata)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(weights, out)
    _write_json(out / "config.json", _config(metadata, is_tied="lm_head.weight" not in weights))
    _write_json(out / "generation_config.json", _special_ids(metadata))
    _write_tokenizer(metadata, out)
    return out


def _checked_name(path_or_id: str | Path) -> str:
    """A folder that exists, or what may be a hub id."""
    path = Path(path_or_id).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"the folder {path} has no config.json: give one written by save_pretrained, or a "
            "Hugging Face hub id"
        )
    # A hub id is "name" or "owner/name".
    is_path = path.is_absolute() or len(path.parts) > 2 or str(path_or_id).startswith((".", "~"))
    if not path.is_dir() and (is_path or path.exists()):
        raise CheckpointError(
            f"{path_or_id} is no folder: give one written by save_pretrained, or a Hugging Face "
            "hub id"
        )
    return str(path if path.is_dir() else path_or_id)


def _open_gguf(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependencyError(
            "converting a GGUF file needs the package gguf, which is not installed. "
            "Run: pip install 'fierpatch[demo]'"
        ) from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a GGUF file: {error}. It may be cut short: fetch it again"
        ) from error


def _weights(reader: GGUFReader, metadata: dict[str, Any]) -> dict[str, Tensor]:
    from gguf import dequantize

    num_heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[part]}"
            if part in num_heads:
                weight = _split_halves(weight, num_heads[part])
        else:
            name = _MODEL_NAMES[stem]
        weights[f"{name}.{kind}"] = weight.bfloat16()
    return weights


def _split_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder a head's channels: RoPE pairs neighbours in llama.cpp, halves in transformers."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_weights(weights: dict[str, Tensor], out: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _config(metadata: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    hidden_size = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # Stored in fp32; six digits give the decimal back that was meant, 1e-05.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "torch_dtype": "bfloat16",
        **_special_ids(metadata),
    }


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(metadata: dict[str, Any], out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # What the GGUF calls "smollm": each digit by itself, the rest as in GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    controls = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    _write_json(out / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
