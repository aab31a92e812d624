"""What cannot work is an error of ours, before anything changes, that says what to do."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache

import fierpatch
from fierpatch import FierCache, FierConfig, FierError
from fierpatch.errors import (
    BackendError,
    CacheMismatchError,
    CapacityError,
    ConfigError,
    MissingDependencyError,
    ModelError,
    NotYetSupportedError,
    PositionLimitError,
    ShapeError,
    TrainingModeError,
    UnsupportedModelError,
)
from hf.fingerprint import fingerprint, registered
from hf.models import prompt, tiny_config, tiny_model

NUM_POSITIONS = 600  # not a multiple of a bucket

SIZES: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTURE = {
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def build(name: str, **fields: Any) -> PreTrainedModel:
    """A causal LM of a family by the name of its configuration."""
    config = getattr(transformers, f"{name}Config")(**fields)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def bloom() -> PreTrainedModel:
    return build("Bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=2)


def falcon() -> PreTrainedModel:
    return build("Falcon", hidden_size=32, **SIZES)


def gptj() -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return build("GPTJ", vocab_size=64, rotary_dim=8, **sizes)


def gpt_neo() -> PreTrainedModel:
    kinds = [[["global", "local"], 1]]
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
    return build("GPTNeo", vocab_size=64, attention_types=kinds, **sizes)


def codegen() -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return build("CodeGen", vocab_size=64, rotary_dim=4, **sizes)


def mpt() -> PreTrainedModel:
    return build("Mpt", vocab_size=64, d_model=32, n_layers=2, n_heads=2)


def xglm() -> PreTrainedModel:
    return build("XGLM", vocab_size=64, d_model=32, num_layers=2, attention_heads=2, ffn_dim=32)


def deepseek_v2() -> PreTrainedModel:
    return build("DeepseekV2", hidden_size=32, **SIZES, **MIXTURE, **LATENT)


def deepseek_v3() -> PreTrainedModel:
    return build("DeepseekV3", hidden_size=32, **SIZES, **MIXTURE, **LATENT)


def mamba() -> PreTrainedModel:
    return build("Mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=64, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


def without_generate() -> PreTrainedModel:
    return tiny_model("llama").model


def all_sliding() -> PreTrainedModel:
    return tiny_model("mistral_sliding")


def of_flex_attention() -> PreTrainedModel:
    return tiny_model("llama", "flex_attention")


BYPASS = "bypasses"
UNSUPPORTED: dict[Callable[[], PreTrainedModel], str] = {
    bloom: BYPASS,
    falcon: BYPASS,
    gptj: BYPASS,
    gpt_neo: BYPASS,
    codegen: BYPASS,
    mpt: BYPASS,
    xglm: BYPASS,
    deepseek_v2: "latent",
    deepseek_v3: "latent",
    mamba: "no full-attention layer",
    all_sliding: "no full-attention layer",
    t5: "encoder-decoder",
    without_generate: "cannot generate",
    of_flex_attention: "flex_attention",
}


@contextlib.contextmanager
def nothing_changes(model: PreTrainedModel) -> Iterator[None]:
    before = fingerprint(model), registered()
    yield
    assert (fingerprint(model), registered()) == before


@pytest.mark.parametrize("make", UNSUPPORTED, ids=lambda make: make.__name__)
def test_a_model_that_cannot_be_patched_is_refused_by_name_with_the_reason(
    make: Callable[[], PreTrainedModel],
) -> None:
    model = make()
    with nothing_changes(model), pytest.raises(UnsupportedModelError) as caught:
        fierpatch.apply(model)
    assert type(model).__name__ in str(caught.value)
    assert UNSUPPORTED[make] in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": -3}, "budget=-3"),
        ({"budget": 19}, "sinks . recent = 4 . 16"),
        ({"budget": 64.0}, "integer"),
        ({"bugdet": 64}, "did you mean 'budget'"),
        ({"index": "fierr"}, "did you mean 'fier'"),
        ({"index": "quest"}, "'rotated', 'fier'"),
        ({"bits": 3}, "choose from 1, 2"),
        ({"index": "fier", "bits": 2}, 'index="rotated"'),
        ({"group_size": 48}, "32, 64, 128, 256 or 512"),
        ({"config": 1024}, "budget=1024"),
        ({"config": {"budget": 64}}, "from_dict"),
        ({"config": FierConfig(), "dense_layer": 1}, "did you mean 'dense_layers'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_patched", [False, True])
def test_a_bad_option_is_named_and_the_patch_that_was_on_stays(
    options: dict[str, Any], message: str, is_patched: bool
) -> None:
    model = tiny_model("llama")
    handle = fierpatch.apply(model, budget=33) if is_patched else None
    with nothing_changes(model), pytest.raises(ConfigError, match=message):
        fierpatch.apply(model, **options)
    assert handle is None or handle.is_attached


def test_flex_attention_over_keys_on_the_host_is_refused() -> None:
    model = tiny_model("llama")
    refused = pytest.raises(ConfigError, match=r"backend=\"flex\" .*backend=\"auto\"")
    with nothing_changes(model):
        with refused:
            fierpatch.apply(model, backend="flex", offload=True)
        with fierpatch.apply(model, budget=24, backend="flex"), refused:
            model.generate(prompt(20), max_new_tokens=4, cache_implementation="offloaded")


def test_a_model_that_flex_attention_has_no_kernel_for_is_refused_and_nothing_is_stored() -> None:
    model = tiny_model("llama").double()
    with fierpatch.apply(model, budget=24, backend="flex", compile=True) as handle:
        with pytest.raises(BackendError, match=r"float64.*\"reference\""):
            model.generate(prompt(20), max_new_tokens=4)
        assert all(layer.tokens == layer.kv_bytes == 0 for layer in handle.report().layers)


@pytest.mark.parametrize("is_installed", [False, True])
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # the second begins with a sliding layer
def test_kernels_that_cannot_run_are_refused_and_nothing_is_stored(
    family: str, is_static: bool, is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_installed:
        pytest.importorskip("triton", reason="Triton is not installed")
        refused = pytest.raises(BackendError, match=r"CUDA device and got cpu.*\"reference\"")
    else:
        monkeypatch.setattr("fierpatch.ops.backend.find_spec", lambda name: None)
        refused = pytest.raises(MissingDependencyError, match=r"pip install fierpatch\[triton\]")
    model = tiny_model(family)
    expected = model.generate(prompt(20), max_new_tokens=4)
    with nothing_changes(model):
        handle = fierpatch.apply(model, budget=24, backend="triton", compile=is_static)
        with refused:
            model.generate(prompt(20), max_new_tokens=4)
        assert all(layer.tokens == layer.kv_bytes == 0 for layer in handle.report().layers)
        cache = handle.new_cache(64)
        with refused, torch.no_grad():
            model(prompt(20), past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert not any(layer.is_initialized for layer in cache.layers)
        handle.remove()
        assert torch.equal(model.generate(prompt(20), max_new_tokens=4), expected)
        with fierpatch.apply(model, budget=24, compile=is_static):
            assert torch.equal(model.generate(prompt(20), max_new_tokens=4), expected)


def test_a_model_in_training_is_refused() -> None:
    model = tiny_model("llama").train()
    with nothing_changes(model), pytest.raises(TrainingModeError, match="eval"):
        fierpatch.apply(model)


@pytest.mark.parametrize(
    "thing", ["gpt2", None, nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), LlamaForCausalLM]
)
@pytest.mark.parametrize("function", [fierpatch.apply, fierpatch.remove])
def test_what_holds_no_model_is_refused(thing: object, function: Callable[[Any], Any]) -> None:
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        function(thing)


def test_two_models_of_one_configuration_object_are_not_both_patched() -> None:
    """Both would look up one name in one place, so one patch would reach into the other model."""
    config = tiny_config("llama")
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    refused = pytest.raises(UnsupportedModelError, match="deepcopy")
    with fierpatch.apply(first), nothing_changes(second), refused:
        fierpatch.apply(second)
    fierpatch.apply(second).remove()


@pytest.mark.parametrize("dump", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_a_patched_model_is_not_pickled(dump: Callable[[Any], Any]) -> None:
    model = tiny_model("llama")
    with fierpatch.apply(model), pytest.raises(FierError, match="save_pretrained"):
        dump(model)
    dump(model)


@pytest.fixture
def handle() -> Iterator[fierpatch.Handle]:
    """A patch on a small Llama of 600 positions."""
    model = tiny_model("llama", max_position_embeddings=NUM_POSITIONS)
    with fierpatch.apply(model, budget=24) as handle:
        yield handle


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("quantized", ConfigError),
        ("sliding_window", ConfigError),
        ("paged", NotYetSupportedError),
    ],
)
def test_a_cache_that_retrieval_cannot_stand_in_for_is_refused(
    handle: fierpatch.Handle, name: str, error: type[FierError]
) -> None:
    with nothing_changes(handle.model), pytest.raises(error):
        handle.model.generate(prompt(20), max_new_tokens=2, cache_implementation=name)


def test_continuous_batching_is_refused_but_runs_where_the_patch_is_disabled(
    handle: fierpatch.Handle,
) -> None:
    model = handle.model
    with nothing_changes(model), pytest.raises(NotYetSupportedError, match="disabled"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
    with handle.disabled():
        assert "init_continuous_batching" not in model.__dict__


def test_attention_weights_are_refused_where_the_unpatched_model_has_them() -> None:
    """Rather than given for some layers and not for others."""
    model = tiny_model("llama", "eager")
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    with fierpatch.apply(model, budget=24) as handle:
        with pytest.raises(ConfigError, match="output_attentions"):
            model.generate(prompt(40), **options)
        with handle.disabled():
            assert len(model.generate(prompt(40), **options).attentions[1]) == 4


def test_speculation_over_static_sliding_layers_is_refused() -> None:
    model = tiny_model("gemma3")
    refused = pytest.raises(ConfigError, match="static")
    with fierpatch.apply(model, budget=24, compile=True), nothing_changes(model), refused:
        model.generate(prompt(40), max_new_tokens=4, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generate_refuses_more_tokens_than_the_model_has_positions(
    handle: fierpatch.Handle, implementation: str | None
) -> None:
    """The last token is only chosen, so it needs no position."""
    options = {"cache_implementation": implementation}
    handle.model.generate(prompt(NUM_POSITIONS - 4), max_new_tokens=5, **options)
    with pytest.raises(PositionLimitError, match="600 positions"):
        handle.model.generate(prompt(NUM_POSITIONS - 4), max_new_tokens=6, **options)


@pytest.mark.parametrize("num_last", [1, 20])
@pytest.mark.parametrize(
    ("is_static", "error"), [(False, PositionLimitError), (True, CapacityError)]
)
@torch.no_grad()
def test_a_forward_pass_past_the_last_position_is_refused(
    handle: fierpatch.Handle, is_static: bool, error: type[FierError], num_last: int
) -> None:
    """Where a static cache rounds its capacity up, it stops at the last position all the same."""
    model = handle.model
    cache = FierCache(model.config, handle.config.replace(compile=is_static), max_cache_len=590)
    model(prompt(NUM_POSITIONS - num_last), past_key_values=cache)
    model(prompt(num_last), past_key_values=cache)
    with pytest.raises(error, match="600"):
        model(prompt(num_last), past_key_values=cache)
    empty = FierCache(model.config, cache.settings, max_cache_len=590)
    with pytest.raises(error, match="600"):
        model(prompt(NUM_POSITIONS + 1), past_key_values=empty)


def test_a_static_cache_longer_than_the_positions_is_refused(handle: fierpatch.Handle) -> None:
    settings = handle.config.replace(compile=True)
    with pytest.raises(PositionLimitError, match="601"):
        FierCache(handle.model.config, settings, max_cache_len=NUM_POSITIONS + 1)


def test_a_model_whose_positions_stretch_has_no_last_one() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama")
    model.config.rope_parameters = rope
    model.config.max_position_embeddings = 32
    with fierpatch.apply(model, budget=24):
        assert model.generate(prompt(60), max_new_tokens=2).shape == (1, 62)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {}),
        ("llama", {"num_hidden_layers": 3}),
        ("llama", {"num_hidden_layers": 5}),
    ],
)
def test_the_cache_of_another_model_is_refused_before_it_is_used(
    handle: fierpatch.Handle, family: str, changes: dict[str, Any]
) -> None:
    other = tiny_model(family, **changes)
    cache = handle.new_cache()
    with fierpatch.apply(other), pytest.raises(CacheMismatchError, match="new cache"):
        other.generate(prompt(20), max_new_tokens=2, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"num_key_value_heads": 4}, torch.float32, r"\[1, 2, 16\]"),
        ({"head_dim": 32}, torch.float32, r"\[1, 2, 16\]"),
        ({}, torch.bfloat16, "bfloat16"),
    ],
)
def test_a_cache_of_other_shapes_or_another_dtype_is_refused(
    handle: fierpatch.Handle, changes: dict[str, Any], dtype: torch.dtype, message: str
) -> None:
    cache = handle.new_cache()
    handle.model.generate(prompt(20), max_new_tokens=2, past_key_values=cache)
    other = tiny_model("llama", max_position_embeddings=NUM_POSITIONS, **changes).to(dtype)
    with fierpatch.apply(other), pytest.raises(CacheMismatchError, match=message):
        other.generate(prompt(30), max_new_tokens=2, past_key_values=cache)


def test_a_batch_of_another_size_is_refused(handle: fierpatch.Handle) -> None:
    cache = handle.new_cache()
    handle.model.generate(prompt(20, 2), max_new_tokens=2, past_key_values=cache)
    with pytest.raises(CacheMismatchError, match="batch of 2"):
        handle.model.generate(prompt(30, 3), max_new_tokens=2, past_key_values=cache)
    with torch.no_grad(), pytest.raises(CacheMismatchError, match=r"\[3, 2, 16\]"):
        handle.model(prompt(1, 3), past_key_values=cache)


def test_more_layers_than_the_cache_has_are_refused_in_a_forward_pass(
    handle: fierpatch.Handle,
) -> None:
    other = tiny_model("llama", num_hidden_layers=5)
    with torch.no_grad(), pytest.raises(CacheMismatchError, match="layer 4"):
        other(prompt(20), past_key_values=handle.new_cache())


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, 64)])
def test_a_cache_of_transformers_own_is_the_choice_of_whoever_passes_it(
    handle: fierpatch.Handle, make: Callable[..., Any]
) -> None:
    """It has no index, so decode is dense: the tokens are those of the unpatched model."""
    model = handle.model
    passed = model.generate(prompt(40), max_new_tokens=6, past_key_values=make(config=model.config))
    with handle.disabled():
        assert torch.equal(model.generate(prompt(40), max_new_tokens=6), passed)


@pytest.mark.parametrize("is_static", [False, True])
def test_keys_that_require_a_gradient_are_refused(
    handle: fierpatch.Handle, is_static: bool
) -> None:
    settings = handle.config.replace(compile=is_static)
    cache = FierCache(handle.model.config, settings, max_cache_len=100)
    with pytest.raises(FierError, match="no_grad"):
        handle.model(prompt(20), past_key_values=cache)


def test_a_patched_model_still_trains_without_our_cache(handle: fierpatch.Handle) -> None:
    tokens = prompt(40)
    handle.model(tokens, labels=tokens).loss.backward()
    gradient = handle.model.get_input_embeddings().weight.grad.clone()
    handle.model.zero_grad()
    with handle.disabled():
        handle.model(tokens, labels=tokens).loss.backward()
        assert torch.equal(handle.model.get_input_embeddings().weight.grad, gradient)


@torch.no_grad()
def test_a_mask_of_numbers_is_refused_in_decode(handle: fierpatch.Handle) -> None:
    """Its entries could be anything; a boolean one says which tokens are visible."""
    model, cache = handle.model, handle.new_cache()
    model(prompt(40), past_key_values=cache)
    with pytest.raises(ShapeError, match="boolean"):
        model(prompt(1), past_key_values=cache, attention_mask=torch.zeros(1, 1, 1, 41))


@torch.no_grad()
def test_a_boolean_mask_of_four_dimensions_is_obeyed_in_decode() -> None:
    model = tiny_model("llama")
    mask = torch.rand(1, 1, 1, 41) < 0.5
    mask[..., -1] = True
    stock = DynamicCache(config=model.config)
    model(prompt(40), past_key_values=stock)
    expected = model(prompt(1), past_key_values=stock, attention_mask=mask).logits
    with fierpatch.apply(model, budget=64) as handle:
        cache = handle.new_cache()
        model(prompt(40), past_key_values=cache)
        logits = model(prompt(1), past_key_values=cache, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected)
