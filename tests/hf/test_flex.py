"""`backend="flex"` generates as the reference does, and decodes in one graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

import fierpatch
from fierpatch import FierCache
from fierpatch.flex import Mode
from hf.agreement import FULL_BUDGET, RECORD, assert_agrees
from hf.models import FAMILIES_AND_BASES, left_padded, prompt, tiny_config, tiny_model

NUM_STEPS = 64
# How generate is called: with growing and static caches, several tokens a step, rows that move.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded": (left_padded(60, (0, 9)), {}),
    "static": (
        left_padded(60, (0, 9)),
        {"cache_implementation": "static", "disable_compile": True},
    ),
    "beams": ({"input_ids": prompt(60)}, {"num_beams": 3}),
    "lookup": ({"input_ids": prompt(60)}, {"prompt_lookup_num_tokens": 6}),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def generated(model: PreTrainedModel, call: str, **settings: Any) -> Any:
    inputs, options = CALLS[call]
    with fierpatch.apply(model, budget=24, dense_layers=1, **settings) as handle:
        output = model.generate(**inputs, **options, max_new_tokens=12, **RECORD)
        backends = {layer.backend for layer in handle.report().layers if layer.kind == "sparse"}
    assert backends == {settings["backend"]}
    return output


@pytest.mark.parametrize(("family", "base"), [("llama", "sdpa"), ("gpt_oss", "eager")])
@pytest.mark.parametrize(
    ("call", "per_query_head"), [*((call, False) for call in CALLS), ("lookup", True)]
)
def test_generate_gives_what_the_reference_gives(
    family: str, base: str, call: str, per_query_head: bool
) -> None:
    """Where little of the prompt is selected, so that the selections have to be the same."""
    model = tiny_model(family, base)
    outputs = [
        generated(model, call, backend=backend, per_query_head=per_query_head)
        for backend in ("reference", "flex")
    ]
    assert torch.equal(*(output.sequences for output in outputs))
    reference, flex = (torch.stack(output.logits) for output in outputs)
    torch.testing.assert_close(flex, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "base"), FAMILIES_AND_BASES)
def test_with_budget_for_all_generate_is_dense(family: str, base: str) -> None:
    inputs = left_padded(60, (0, 9))
    assert_agrees(
        lambda: tiny_model(family, base),
        lambda model: model.generate(**inputs, max_new_tokens=8, **RECORD),
        backend="flex",
        dense_layers=0,
    )


def two_layers(family: str) -> PreTrainedModel:
    kinds = tiny_config(family).layer_types if family == "gpt_oss" else None
    changes = {} if kinds is None else {"layer_types": kinds[:2]}
    base = "eager" if family == "gpt_oss" else "sdpa"
    return tiny_model(family, base, num_hidden_layers=2, **changes)


@torch.no_grad()
def decode(model: PreTrainedModel, step: Any, cache: FierCache) -> Tensor:
    """The logits of a prompt and of single tokens after it."""
    logits = [model(prompt(40), past_key_values=cache).logits[:, -1:]]
    for _ in range(NUM_STEPS):
        logits.append(step(logits[-1].argmax(-1), past_key_values=cache).logits)
    return torch.cat(logits, 1)


def assert_one_graph(family: str, compiler: str, tolerance: float) -> None:
    """Decode compiles into one graph, and gives what the reference gives uncompiled."""
    model = two_layers(family)
    settings: dict[str, Any] = {"budget": 24, "compile": True, "dense_layers": 1}
    with fierpatch.apply(model, backend="reference", **settings) as handle:
        expected = decode(model, model.forward, handle.new_cache(110))
    with fierpatch.apply(model, backend="flex", **settings) as handle:
        counter = CompileCounterWithBackend(compiler)
        step = torch.compile(model.forward, fullgraph=True, backend=counter)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = decode(model, step, handle.new_cache(110))
            again = decode(model, step, handle.new_cache(110))
    assert counter.frame_count == 1
    assert torch.equal(again, compiled)
    torch.testing.assert_close(compiled, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["compact", "mask"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mode:
    """Each mode in turn, whatever the sizes would choose."""
    monkeypatch.setattr("fierpatch.flex.operators.MODE", request.param)
    return request.param


def test_decode_is_one_graph_for_64_changing_masks(mode: Mode) -> None:
    assert_one_graph("llama", "aot_eager", 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")  # its own
def test_inductor_gives_the_logits_of_the_reference(mode: Mode) -> None:
    assert_one_graph("llama", "inductor", 1e-3)


@pytest.mark.parametrize("is_static", [False, True])
def test_with_budget_for_all_assisted_decoding_is_dense(is_static: bool) -> None:
    """A smaller model drafts, so that several queries are verified at once."""
    model, assistant = tiny_model("llama"), tiny_model("llama", num_hidden_layers=1)
    options: dict[str, Any] = {"max_new_tokens": 16, "assistant_model": assistant}
    stock = model.generate(prompt(40), **options)
    with fierpatch.apply(
        model, budget=FULL_BUDGET, backend="flex", dense_layers=1, compile=is_static
    ):
        output = model.generate(prompt(40), **options, disable_compile=True)
        assert torch.equal(output, stock)
