"""A tokenizer of bytes for the tiny models, and folders that hold both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf.models import tiny_model

NUM_TOKENS = 300  # the bytes, the special tokens, and some that no text gives
CHAT_TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, from 2 up; no padding token and no chat template unless given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **special)


def save_tiny_model(folder: Path, *, chat_template: str | None = None, **changes: Any) -> Path:
    """Write a tiny Llama that knows those tokens, and the tokenizer, to a folder."""
    tiny_model("llama", vocab_size=NUM_TOKENS, **changes).save_pretrained(folder)
    byte_tokenizer(pad_token="<pad>", chat_template=chat_template).save_pretrained(folder)
    return folder
