"""With every block chosen a sparse prefill gives what a dense one does; otherwise fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fierpatch
from fierpatch import FierConfig
from fierpatch.errors import ConfigError, NotYetSupportedError, ShapeError, UnsupportedModelError
from fierpatch.flex import Span
from fierpatch.hf.attention import to_visible
from hf.agreement import RECORD, assert_agrees
from hf.models import FAMILIES_AND_BASES, left_padded, prompt, tiny_model
from hf.test_generate import MODES, converse, default_cache, generate

# Compiled, a prompt has no length that the host knows.
EAGER_MODES = [mode for mode in MODES if mode != "static cache, prefill in chunks"]
EVERYTHING = {"prefill": "sparse", "prefill_mass": 1.0}
FEW = FierConfig(budget=40, prefill="sparse", prefill_mass=0.5)


@pytest.mark.parametrize(("family", "base"), FAMILIES_AND_BASES)
def test_with_a_mass_of_1_left_padded_rows_agree(family: str, base: str) -> None:
    """GQA, softcap, attention sinks, sliding layers between; off the size of a block."""
    inputs = left_padded(200, (0, 70, 195))
    assert_agrees(
        lambda: tiny_model(family, base),
        lambda model: generate(model, **inputs, max_new_tokens=4),
        **EVERYTHING,
    )


@pytest.mark.parametrize("mode", EAGER_MODES)
def test_with_a_mass_of_1_every_mode_of_generate_agrees(mode: str) -> None:
    assert_agrees(lambda: tiny_model("llama"), MODES[mode], **EVERYTHING)


def test_with_a_mass_of_1_turns_of_a_conversation_agree() -> None:
    assert_agrees(lambda: tiny_model("qwen3"), converse(default_cache), **EVERYTHING)


def density(model: PreTrainedModel, ids: Tensor, settings: FierConfig) -> tuple[Tensor, set[int]]:
    """Logits of a prompt, and the layers that chose blocks, with what they left out."""
    seen: set[int] = set()

    def watch(number: int) -> Any:
        def observer(span: Span, chosen: Tensor) -> None:
            assert chosen.shape[1] == model.config.num_attention_heads
            if chosen.float().mean() < 0.4:  # of all, half of which are causal
                seen.add(number)

        return observer

    with fierpatch.apply(model, settings) as handle, torch.inference_mode():
        cache = handle.new_cache()
        for number, store in cache.stores.items():
            store.block_observer = watch(number)
        return model(ids, past_key_values=cache).logits, seen


def test_layers_that_are_not_dense_leave_blocks_out() -> None:
    model, ids = tiny_model("llama"), prompt(1500)
    _, seen = density(model, ids, FEW.replace(dense_layers=1))
    assert seen == {1, 2, 3}


def test_offload_changes_nothing_of_a_sparse_prefill() -> None:
    model, ids = tiny_model("llama"), prompt(700)
    resident, _ = density(model, ids, FEW)
    offloaded, _ = density(model, ids, FEW.replace(offload=True))
    assert torch.equal(resident, offloaded)


def test_blocks_may_be_chosen_by_the_index() -> None:
    model, ids = tiny_model("llama"), prompt(1500)
    dense, _ = density(model, ids, FEW.replace(prefill="dense"))
    settings = FEW.replace(prefill_mass=0.9)
    by_keys, _ = density(model, ids, settings)
    by_index, _ = density(model, ids, settings.replace(prefill_scores="index"))
    assert not torch.equal(by_keys, by_index)
    assert not torch.equal(by_keys, dense)


def test_a_second_prompt_chooses_among_the_tokens_of_the_first_too() -> None:
    """Both parts are indexed when the second is read, by the calibration of the first."""
    model, ids = tiny_model("llama"), prompt(900)
    lengths = []
    with fierpatch.apply(model, FEW.replace(offload=True)) as handle, torch.inference_mode():
        cache = handle.new_cache()
        cache.stores[3].block_observer = lambda span, chosen: lengths.append(
            (span.stored, span.length, chosen[..., : 600 // 64].any().item())
        )
        model(ids[:, :600], past_key_values=cache)
        model(ids[:, 600:], past_key_values=cache)
    assert {(stored, length) for stored, length, _ in lengths} == {(0, 600), (600, 900)}
    assert all(is_any for *_, is_any in lengths)


def test_the_same_patch_leaves_a_short_prompt_and_decode_alone() -> None:
    ids = prompt(30)
    outputs = []
    for settings in (FierConfig(budget=40), FEW):
        model = tiny_model("llama")
        with fierpatch.apply(model, settings):
            outputs.append(model.generate(ids, max_new_tokens=8, **RECORD))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)


def test_a_compiled_prompt_is_refused() -> None:
    model = tiny_model("llama")
    with fierpatch.apply(model, FEW), pytest.raises(NotYetSupportedError, match="prefill_chunk"):
        MODES["static cache, prefill in chunks"](model)


def test_weights_of_every_token_are_refused() -> None:
    model = tiny_model("llama", "eager")
    options = {"output_attentions": True, "return_dict_in_generate": True}
    with fierpatch.apply(model, FEW), pytest.raises(ConfigError, match="output_attentions"):
        model.generate(prompt(300), max_new_tokens=3, **options)


CAUSAL = torch.ones(1, 1, 9, 20, dtype=torch.bool).tril(11)


@pytest.mark.parametrize("at_once", [1, 1 << 28])
@pytest.mark.parametrize("is_added", [False, True])
def test_a_mask_becomes_boolean_and_as_small_as_it_can_be(
    is_added: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fierpatch.hf.attention, "_MASK_AT_ONCE", at_once)

    def visible_of(mask: Tensor) -> Tensor | None:
        if is_added:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return to_visible(mask, torch.nn.Identity(), 9)

    padding = torch.arange(20) >= torch.tensor([0, 15])[:, None, None, None]
    scattered = CAUSAL & (torch.rand(2, 1, 9, 20) < 0.5)
    assert visible_of(CAUSAL) is None
    assert torch.equal(visible_of(CAUSAL & padding), padding)
    assert torch.equal(visible_of(scattered), scattered)


def test_a_mask_of_padding_stays_one() -> None:
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert to_visible(None, torch.nn.Identity(), 2) is None
    visible = to_visible(padding, torch.nn.Identity(), 2)
    assert torch.equal(visible, padding.bool()[:, None, None])


def test_a_mask_that_is_not_causal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Identity()
    visible = CAUSAL.clone()
    visible[0, 0, 5, 17] = True
    for at_once in (1, 1 << 28):
        monkeypatch.setattr(fierpatch.hf.attention, "_MASK_AT_ONCE", at_once)
        with pytest.raises(UnsupportedModelError, match="later ones"):
            to_visible(visible, module, 9)


@pytest.mark.parametrize("shape", [(1, 2, 9, 20), (1, 9, 20), (1, 1, 8, 20)])
def test_a_mask_of_another_form_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="sparse prefill"):
        to_visible(torch.ones(shape, dtype=torch.bool), torch.nn.Identity(), 9)
