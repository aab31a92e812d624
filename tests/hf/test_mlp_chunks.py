"""MLPs that are given a prompt in parts change nothing, and are whole again when the patch goes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fierpatch
from fierpatch.errors import FierError, UnsupportedModelError
from hf.agreement import assert_agrees
from hf.fingerprint import fingerprint
from hf.models import left_padded, prompt, tiny_model
from hf.test_generate import generate, static


def widest(model: Any, ids: Tensor) -> int:
    """The most tokens that the projection of an MLP sees in a prefill."""
    seen: list[int] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].shape[1])
        )
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(ids)
    for handle in handles:
        handle.remove()
    return max(seen)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_a_prompt_in_parts_agrees(family: str, prefill: str) -> None:
    inputs = left_padded(70, (0, 30))
    assert_agrees(
        lambda: tiny_model(family),
        lambda model: generate(model, **inputs, max_new_tokens=4),
        mlp_chunk=32,
        prefill=prefill,
        prefill_mass=1.0,
    )


def test_a_compiled_decode_agrees() -> None:
    assert_agrees(lambda: tiny_model("llama"), static, mlp_chunk=16)


@pytest.mark.parametrize(("length", "most"), [(100, 32), (32, 32), (20, 20), (64, 32)])
def test_no_part_is_longer_than_asked(length: int, most: int) -> None:
    model = tiny_model("llama")
    with fierpatch.apply(model, mlp_chunk=32) as handle:
        assert widest(model, prompt(length)) == most
        with handle.disabled():
            assert widest(model, prompt(length)) == length
    assert widest(model, prompt(length)) == length


def test_nothing_stays_behind() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    fierpatch.apply(model, mlp_chunk=32).remove()
    assert fingerprint(model) == before


def test_a_failed_prefill_leaves_nothing_for_the_next() -> None:
    model, ids = tiny_model("llama"), prompt(100)
    with fierpatch.apply(model, mlp_chunk=32), torch.inference_mode():
        expected = model(ids).logits

        def fail(*_: Any) -> None:
            raise RuntimeError("as asked")

        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="as asked"):
            model(ids)
        handle.remove()
        assert torch.equal(model(ids).logits, expected)
        assert model(ids[:, :5]).logits.shape[1] == 5


def test_a_copied_model_has_hooks_of_its_own() -> None:
    model, ids = tiny_model("llama"), prompt(100)
    handle = fierpatch.apply(model, mlp_chunk=32)
    copied = copy.deepcopy(model)
    handle.remove()
    assert (widest(model, ids), widest(copied, ids)) == (100, 32)
    with torch.inference_mode():
        torch.testing.assert_close(copied(ids).logits, model(ids).logits)
    fierpatch.remove(copied)
    assert widest(copied, ids) == 100


def test_a_patched_model_is_not_pickled() -> None:
    model = tiny_model("llama")
    with fierpatch.apply(model, mlp_chunk=32), pytest.raises(FierError, match="pickled"):
        pickle.dumps(model.model.layers[0].mlp)


def test_experts_are_refused_before_anything_changes() -> None:
    model = tiny_model("gpt_oss")
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="mlp_chunk=0"):
        fierpatch.apply(model, mlp_chunk=32)
    assert fingerprint(model) == before
