"""Every causal LM type of transformers is refused by name, or generates as it does unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fierpatch
from fierpatch.errors import UnsupportedModelError
from hf.agreement import FULL_BUDGET, RECORD
from hf.any_model import MODEL_TYPES, any_model
from hf.fingerprint import fingerprint, registered
from hf.models import left_padded

# Each must be patched: neither skipped nor refused.
MUST_WORK = (
    *("bamba", "bert", "cohere2", "ctrl", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4"),
    *("gpt2", "gpt_oss", "granite", "jamba", "lfm2", "llama", "mistral", "mixtral", "olmo3", "opt"),
    *("phi3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "smollm3", "starcoder2"),
)
# A type is stranger to us than to its own code, so its warnings are its own affair.
pytestmark = pytest.mark.filterwarnings("ignore")


def generate(model: PreTrainedModel, **options: Any) -> Any:
    inputs = left_padded(48, (0, 9))
    return model.generate(**inputs, min_new_tokens=6, max_new_tokens=6, **RECORD, **options)


def assert_equal(patched: Any, stock: Any) -> None:
    """In tokens, and in logits by far more than a small budget would leave of them."""
    assert torch.equal(patched.sequences, stock.sequences)
    logits = torch.stack(stock.logits)
    error = (torch.stack(patched.logits) - logits).abs().max()
    assert error <= 1e-3 * logits.abs().max()


def check(model: PreTrainedModel) -> int:
    """Compare the patched model with itself unpatched: how many layers are sparse."""
    stock = generate(model)
    if not torch.stack(stock.logits).isfinite().all():
        pytest.skip("the unpatched model gives NaN")
    try:
        stock_static = generate(model, cache_implementation="static")
    except Exception:
        stock_static = None  # a static cache is beyond the unpatched model itself
    before = fingerprint(model)
    with fierpatch.apply(model, budget=FULL_BUDGET, dense_layers=0) as handle:
        assert_equal(generate(model), stock)
        num_sparse = check_sparse(model, handle)
    # Here some of our layers stay dense, and read a whole static buffer by its mask.
    with fierpatch.apply(model, budget=FULL_BUDGET, dense_layers=2):
        if stock_static is not None:
            assert_equal(generate(model, cache_implementation="static"), stock_static)
    assert fingerprint(model) == before
    return num_sparse


@torch.no_grad()
def check_sparse(model: PreTrainedModel, handle: fierpatch.Handle) -> int:
    """What the report calls sparse does retrieve, and nothing else does."""
    cache = handle.new_cache()
    numbers = {id(store): number for number, store in cache.stores.items()}
    seen: set[int] = set()
    cache.observe(lambda layer, *args: seen.add(numbers[id(layer)]))
    tokens = left_padded(20, (0,))["input_ids"]
    model(tokens[:, :-1], past_key_values=cache, use_cache=True)
    model(tokens[:, -1:], past_key_values=cache, use_cache=True)
    sparse = {layer.number for layer in handle.report(cache).layers if layer.kind == "sparse"}
    assert seen == sparse
    return len(sparse)


def skip(model_type: str, error: Exception) -> None:
    assert model_type not in MUST_WORK
    pytest.skip(f"unpatched: {type(error).__name__}: {str(error)[:200]}")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_is_refused_or_generates_as_it_does_unpatched(model_type: str) -> None:
    try:
        model = any_model(model_type)
    except Exception as error:
        skip(model_type, error)
    before = fingerprint(model), registered()
    try:
        fierpatch.apply(model).remove()
    except UnsupportedModelError:
        assert model_type not in MUST_WORK
        assert (fingerprint(model), registered()) == before
        return
    try:
        generate(model)
    except Exception as error:
        skip(model_type, error)
    assert check(model) > 0


@pytest.mark.parametrize("model_type", MUST_WORK)
def test_a_model_generates_alike_on_its_eager_attention(model_type: str) -> None:
    """Whose masks are numbers to add, where ours are boolean."""
    assert check(any_model(model_type, "eager")) > 0
