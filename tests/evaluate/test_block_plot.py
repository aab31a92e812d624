"""A picture shows the blocks that a layer attends, and names them by the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fierpatch import FierConfig
from fierpatch.evaluate.block_plot import block_names, plot_blocks, prompt_blocks
from hf.models import prompt, tiny_model
from hf.tokens import byte_tokenizer

SETTINGS = FierConfig(budget=64, dense_layers=1, prefill="sparse", prefill_mass=0.3)


def test_blocks_are_those_of_every_query_head() -> None:
    model = tiny_model("llama")
    chosen = prompt_blocks(model, prompt(300), SETTINGS, 1)
    assert chosen.shape == (model.config.num_attention_heads, 3, 5)
    assert chosen[:, :, 0].all(), "sinks"
    row = torch.arange(3)
    assert chosen[:, row, (2 * row + 1).clamp(max=4)].all(), "the newest tokens"
    assert not chosen[:, 0, 2:].any(), "later ones"


def test_a_block_is_named_by_its_first_words() -> None:
    text = "It was a dark and stormy night. " * 8
    names = block_names(byte_tokenizer(), byte_tokenizer().encode(text))
    assert names == ["It w", "It w"]


def test_a_picture_is_saved_and_its_density_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chosen = torch.tensor([[True, False, False, False], [True, False, True, True]])
    path = tmp_path / "blocks.png"
    # A dollar starts a formula, unless it is told not to.
    assert plot_blocks(chosen, ["$\\x", "b"], "layer 1", path) == 4 / 6
    assert path.read_bytes().startswith(b"\x89PNG")
