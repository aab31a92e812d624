"""transformers at a terminal: its own messages off, and generated text as it comes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """No warnings and no bars for loading weights within the block; the bars of downloads stay."""
    if not is_quiet:
        yield
        return
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    hub = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers_logging.get_verbosity(), hub.level
    has_bars, has_hub_bars = (
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    transformers_logging.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if has_hub_bars:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if has_bars:
            transformers_logging.enable_progress_bar()


def stream_text(model: Any, tokenizer: Any, input_ids: Tensor, *, max_new_tokens: int) -> None:
    """Continue one prompt greedily and print the text to standard output word by word.

    Args:
        model: a causal LM, patched or not.
        tokenizer: the model's.
        input_ids: ``[1, T]``.
        max_new_tokens: how many tokens to generate at most.
    """
    input_ids = input_ids.to(model.device)
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
