"""Model folders: loading a causal LM with its tokenizer, and converting a GGUF file into such a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fierpatch import errors

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
    """Load a causal LM, in eval mode, and its tokenizer from a folder or a Hugging Face hub id.

    Args:
        path_or_id: a folder holding `config.json`, weights and tokenizer, or a hub id.
        dtype: floating-point type of the weights; None keeps the type they are stored in.
        device: where the model goes; None leaves it on the CPU.

    Raises:
        CheckpointError: the folder or id has no loadable causal LM or no tokenizer.

    Example:
        >>> model, tokenizer = load("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(path_or_id)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise errors.CheckpointError(
            f"{folder} has no config.json; wanted a folder written by save_pretrained. "
            "Give such a folder, or a Hugging Face hub id."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_id))
        model = AutoModelForCausalLM.from_pretrained(str(path_or_id), dtype="auto" if dtype is None else dtype)
    except (OSError, ValueError, KeyError) as error:
        raise errors.CheckpointError(
            f"{str(path_or_id)!r} could not be loaded as a causal LM with its tokenizer: {error} "
            "Wanted a folder written by save_pretrained or a reachable Hugging Face hub id."
        ) from error
    if device is not None:
        model.to(device)
    model.eval()
    return model, tokenizer


def convert_gguf(gguf_path: str | Path, out_dir: str | Path) -> Path:
    """Convert a GGUF file of the Llama architecture with a GPT-2 style tokenizer into a model folder.

    The folder holds `config.json`, `generation_config.json`, `model.safetensors` (bf16), `tokenizer.json` and
    `tokenizer_config.json`; `load` and `AutoModelForCausalLM.from_pretrained` read it without gguf or accelerate.
    Quantised tensors are dequantised to fp32 and then rounded to bf16.

    Args:
        gguf_path: the GGUF file; made for SmolLM2, whose pre-tokenizer splits digits one by one.
        out_dir: the folder to write, created where missing.

    Returns:
        `out_dir` as a Path.

    Raises:
        MissingDependencyError: the gguf package is not installed.
        CheckpointError: the file is not a GGUF, or of another architecture or tokenizer.
    """
    reader = _open_gguf(Path(gguf_path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    for name, wanted in _WANTED.items():
        if metadata.get(name) != wanted:
            raise errors.CheckpointError(
                f"{gguf_path} has {name} = {metadata.get(name)!r}; wanted {wanted!r}. "
                "Only SmolLM2 GGUF files can be converted: give a model folder or hub id to load instead."
            )
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    state = _state_dict(reader, metadata["llama.attention.head_count"], metadata["llama.attention.head_count_kv"])
    _write_weights(state, out)
    _write_json(out / "config.json", _config(metadata, is_tied="lm_head.weight" not in state))
    _write_json(out / "generation_config.json", _special_token_ids(metadata))
    _write_tokenizer(metadata, out)
    return out


_WANTED = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}


def _open_gguf(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise errors.MissingDependencyError(
            "converting a GGUF file needs the gguf package, which is not installed. "
            "Run: pip install 'fierpatch[demo]'"
        ) from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise errors.CheckpointError(f"{path} could not be read as a GGUF file: {error}") from error


def _state_dict(reader: GGUFReader, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    permuted: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "attn_q": lambda weight: _to_half_split(weight, num_heads),
        "attn_k": lambda weight: _to_half_split(weight, num_kv_heads),
    }
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[part]}"
            weight = permuted.get(part, lambda unchanged: unchanged)(weight)
        else:
            name = _MODEL_NAMES[stem]
        state[f"{name}.{kind}"] = weight.to(torch.bfloat16).contiguous()
    return state


def _to_half_split(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's permutation: its RoPE pairs neighbouring channels, transformers' pairs the two halves."""
    num_pairs = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, num_pairs, 2, -1).transpose(1, 2).reshape(weight.shape)


def _write_weights(state: dict[str, torch.Tensor], out: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def _config(metadata: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    num_heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // num_heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # The metadata is fp32; six digits bring back the decimal that was meant (1e-05).
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied,
        "torch_dtype": "bfloat16",
        **_special_token_ids(metadata),
    }


def _special_token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(metadata: dict[str, Any], out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": metadata["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
            "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
