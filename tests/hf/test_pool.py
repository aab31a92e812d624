"""Static layers serve one `generate` after another at the same addresses, and nobody else's run."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

import fierpatch
from fierpatch import FierCache, FierConfig
from fierpatch.cache import LayerCache
from fierpatch.errors import ConfigError
from fierpatch.hf.cache import FierLayer
from hf.models import left_padded, prompt, tiny_model

SETTINGS = FierConfig(budget=24, dense_layers=0, compile=True)
FAMILIES = ("llama", "gemma3", "gpt_oss")  # the last two with static sliding layers

every_family = pytest.mark.parametrize("family", FAMILIES)


def small(family: str = "llama") -> PreTrainedModel:
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    return tiny_model(family, num_hidden_layers=2, **({} if family == "llama" else kinds))


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = small()
    fierpatch.apply(model, SETTINGS)
    yield model
    fierpatch.remove(model)


def run(model: PreTrainedModel, length: int = 48, batch_size: int = 1, **options: Any) -> Tensor:
    output: Tensor = model.generate(prompt(length, batch_size), max_new_tokens=6, **options)
    return output


def alone(family: str = "llama", length: int = 48, batch_size: int = 1, **options: Any) -> Tensor:
    """What a model generates that has not generated before."""
    model = small(family)
    with fierpatch.apply(model, SETTINGS):
        return run(model, length, batch_size, **options)


def pooled_layers(model: PreTrainedModel) -> tuple[Any, ...]:
    return model.__dict__["_fierpatch_handle"]._pool._layers


def buffers(model: PreTrainedModel) -> list[Tensor]:
    """All tensors of the pooled layers that a graph would be bound to."""
    found = []
    for layer in pooled_layers(model):
        if isinstance(layer, FierLayer):
            store = layer.store
            found += [store.keys, store.values, store.counters, *store.state]
        else:
            found += [layer.keys, layer.values, layer.cumulative_length]
    return found


def addresses(model: PreTrainedModel) -> list[int]:
    return [tensor.data_ptr() for tensor in buffers(model)]


def layer_caches() -> list[LayerCache]:
    return [each for each in gc.get_objects() if type(each) is LayerCache]


@every_family
def test_runs_share_their_addresses_and_nothing_else(family: str) -> None:
    model = small(family)
    with fierpatch.apply(model, SETTINGS):
        inputs = left_padded(60, (9,), seed=3)
        run(model)
        before = addresses(model)
        assert 0 not in before
        model.generate(**inputs, max_new_tokens=30)
        for length in (100, 20, 48, 1, 48):
            assert torch.equal(run(model, length), alone(family, length))
            assert addresses(model) == before


def test_all_buffers_are_marked_as_static_in_every_run(model: PreTrainedModel) -> None:
    for _ in range(2):
        run(model)
        assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in buffers(model))


def test_a_longer_run_gets_longer_layers_which_shorter_ones_then_share(
    model: PreTrainedModel,
) -> None:
    run(model)
    assert torch.equal(run(model, 600), alone(length=600))
    assert {layer.get_max_length() for layer in pooled_layers(model)} == {1024}
    before = addresses(model)
    for length in (48, 700, 600):
        assert torch.equal(run(model, length), alone(length=length))
        assert addresses(model) == before


def test_the_longest_cache_asked_for_by_name_is_pooled(model: PreTrainedModel) -> None:
    run(model, cache_implementation="static", max_cache_len=1500)
    before = addresses(model)
    run(model, 1400)
    assert addresses(model) == before


def test_memory_of_layers_that_do_not_fit_is_released_whoever_holds_the_tensors(
    model: PreTrainedModel,
) -> None:
    """As a captured graph does. A view of one is not pulled from under its owner."""
    run(model)
    store = pooled_layers(model)[1].store
    held = [store.keys, store.values, *store.state]
    view = store.keys[:, :, :10]
    old = view.clone()
    run(model, 600)
    assert [tensor.numel() for tensor in held] == [0] * len(held)
    assert torch.equal(view, old)


@pytest.mark.parametrize("change", ["rows", "beams", "settings", "dtype", "autocast", "layers"])
def test_layers_that_do_not_fit_are_not_used(model: PreTrainedModel, change: str) -> None:
    fresh = small()
    run(model)
    before = pooled_layers(model)
    rows, options, context = 1, {}, contextlib.nullcontext()
    match change:
        case "rows":
            rows = 2
        case "beams":
            options = {"num_beams": 2}
        case "settings":
            handle = model.__dict__["_fierpatch_handle"]
            handle.config = handle.config.replace(budget=30)
        case "dtype":
            fresh.to(torch.float64), model.to(torch.float64)
        case "autocast":
            context = torch.autocast("cpu", torch.bfloat16)
        case "layers":
            for each in (fresh, model):
                each.config.num_hidden_layers = 1
                each.model.config.num_hidden_layers = 1
    budget = 30 if change == "settings" else SETTINGS.budget
    with context, fierpatch.apply(fresh, SETTINGS, budget=budget):
        expected = run(fresh, batch_size=rows, **options)
        assert torch.equal(run(model, batch_size=rows, **options), expected)
    assert pooled_layers(model)[0] is not before[0]


@every_family
def test_beams_leave_layers_that_serve_beams_again(family: str) -> None:
    model = small(family)
    with fierpatch.apply(model, SETTINGS):
        run(model, num_beams=2)
        assert torch.equal(run(model, 60, num_beams=2), alone(family, 60, num_beams=2))
        assert torch.equal(run(model, 48, batch_size=2), alone(family, 48, batch_size=2))
        assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in buffers(model))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}])
def test_speculation_serves_and_leaves_layers_as_any_run(
    model: PreTrainedModel, options: dict[str, Any]
) -> None:
    expected = alone(**options)
    for _ in range(3):
        assert torch.equal(run(model, **options), expected)
        assert torch.equal(run(model), alone())


def test_prefill_in_chunks_serves_and_leaves_layers_as_any_run(model: PreTrainedModel) -> None:
    with torch._dynamo.config.patch(recompile_limit=8):  # which prefill in chunks raises for good
        options = {"prefill_chunk_size": 32}
        expected = alone(length=70, **options)
        run(model, 70, **options)
        before = addresses(model)
        assert torch.equal(run(model, 70, **options), expected)
        assert torch.equal(run(model), alone())
    assert addresses(model) == before


def widened(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """A decoding loop that leaves its cache with more rows than it was made with."""
    cache = kwargs["past_key_values"]
    model(input_ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    if kwargs.get("is_narrowed"):
        cache.batch_select_indices(torch.tensor([1]))
    return input_ids


@pytest.mark.parametrize("is_narrowed", [False, True])
def test_a_run_that_changed_its_rows_spoils_no_later_one(
    model: PreTrainedModel, is_narrowed: bool
) -> None:
    def loop(model: PreTrainedModel, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return widened(model, input_ids, is_narrowed=is_narrowed, **kwargs)

    run(model, custom_generate=loop)
    assert torch.equal(run(model), alone())
    assert torch.equal(run(model, batch_size=3), alone(batch_size=3))


class TestCachesInUse:
    @every_family
    def test_a_cache_that_was_kept_is_its_keepers(self, family: str) -> None:
        model = small(family)
        with fierpatch.apply(model, SETTINGS):
            output = model.generate(prompt(48), max_new_tokens=6, return_dict_in_generate=True)
            cache = output.past_key_values
            kept = [layer.keys.clone() for layer in cache.layers]
            assert torch.equal(run(model, 60), alone(family, 60))
            assert torch.equal(run(model, 600), alone(family, 600))
            for layer, keys in zip(cache.layers, kept, strict=True):
                assert torch.equal(layer.keys, keys)
            # Nor does a second turn over it touch the layers of others.
            tokens = torch.cat((output.sequences, prompt(5, seed=1)), 1)
            before = [tensor.clone() for tensor in buffers(model)]
            second = model.generate(tokens, max_new_tokens=6, past_key_values=cache)
            assert all(map(torch.equal, buffers(model), before))
        other = small(family)
        with fierpatch.apply(other, SETTINGS):
            output = other.generate(prompt(48), max_new_tokens=6, return_dict_in_generate=True)
            cache = output.past_key_values
            expected = other.generate(tokens, max_new_tokens=6, past_key_values=cache)
        assert torch.equal(second, expected)

    def test_a_shallow_copy_keeps_them_too(self, model: PreTrainedModel) -> None:
        output = run(model, return_dict_in_generate=True)
        duplicate = copy.copy(output.past_key_values)
        keys = duplicate.layers[1].keys
        del output
        old = keys.clone()
        run(model, 60)
        assert torch.equal(keys, old)

    def test_layers_come_back_when_their_keeper_lets_go(self, model: PreTrainedModel) -> None:
        output = run(model, return_dict_in_generate=True)
        before = addresses(model)
        del output
        run(model)
        assert addresses(model) == before

    def test_a_cycle_of_garbage_is_no_keeper(self, model: PreTrainedModel) -> None:
        cycle: list[Any] = [run(model, return_dict_in_generate=True)]
        cycle.append(cycle)
        before = addresses(model)
        gc.disable()
        try:
            del cycle
            run(model)
            assert addresses(model) == before
            assert len(layer_caches()) == 2
        finally:
            gc.enable()

    def test_a_run_within_a_run_has_layers_of_its_own(self, model: PreTrainedModel) -> None:
        inner = []

        def nested(input_ids: Tensor, scores: Tensor) -> Tensor:
            if len(inner) < 3:
                inner.append(run(model, 60))
            return scores

        assert torch.equal(run(model, logits_processor=[nested]), alone())
        for tokens in inner:
            assert torch.equal(tokens, alone(length=60))

    def test_threads_have_layers_of_their_own(self, model: PreTrainedModel) -> None:
        expected = {length: alone(length=length) for length in (40, 48, 56)}
        wrong: list[int] = []

        def repeat(length: int) -> None:
            wrong.extend(
                length for _ in range(4) if not torch.equal(run(model, length), expected[length])
            )

        threads = [threading.Thread(target=repeat, args=(length,)) for length in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_an_observer_does_not_outstay_its_run(self, model: PreTrainedModel) -> None:
        output = run(model, return_dict_in_generate=True)
        seen: list[Any] = []
        output.past_key_values.observe(lambda *args: seen.append(args))
        del output
        run(model)
        assert seen == []


def test_a_run_that_failed_spoils_no_later_one(model: PreTrainedModel) -> None:
    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 50:
            raise KeyboardInterrupt
        return scores

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, logits_processor=[fail])
        assert torch.equal(run(model), alone())


@every_family
def test_runs_in_and_out_of_inference_mode_alternate(family: str) -> None:
    """Those that transformers allocates are bound to the mode of their first run."""
    model = small(family)
    with fierpatch.apply(model, SETTINGS):
        for _ in range(2):
            with torch.inference_mode():
                assert torch.equal(run(model), alone(family))
            assert torch.equal(run(model), alone(family))
            assert torch.equal(run(model, 600), alone(family, 600))


def test_a_growing_cache_is_not_pooled(model: PreTrainedModel) -> None:
    with fierpatch.apply(model, SETTINGS, compile=False):
        run(model)
        assert pooled_layers(model) == ()
        run(model, cache_implementation="static")
        assert len(pooled_layers(model)) == 2


class TestTheEnd:
    @pytest.mark.parametrize("is_for_good", [True, False])
    def test_memory_is_released_when_the_patch_goes(self, is_for_good: bool) -> None:
        model = small()
        handle = fierpatch.apply(model, SETTINGS)
        run(model)
        keys = pooled_layers(model)[1].store.keys
        before = str(handle.report())
        if is_for_good:
            handle.remove()
            assert keys.numel() == 0
        else:
            with handle.disabled():
                assert keys.numel() == 0
            assert str(handle.report()) == before
            assert torch.equal(run(model), alone())
        assert str(handle.report()) == before

    def test_a_cache_that_was_kept_outlives_the_patch(self, model: PreTrainedModel) -> None:
        cache = run(model, return_dict_in_generate=True).past_key_values
        fierpatch.remove(model)
        assert cache.layers[1].keys.count_nonzero() > 0

    def test_memory_goes_with_the_model_whoever_keeps_the_handle(self) -> None:
        model = small()
        handle = fierpatch.apply(model, SETTINGS)
        run(model)
        keys = pooled_layers(model)[1].store.keys
        gc.collect()
        gc.disable()
        try:
            del model
            assert keys.numel() == 0
            assert layer_caches() == []
        finally:
            gc.enable()
        assert not handle._pool._layers

    def test_the_copy_of_a_model_has_layers_of_its_own(self, model: PreTrainedModel) -> None:
        run(model)
        duplicate = copy.deepcopy(model)
        before = [tensor.clone() for tensor in buffers(model)]
        assert pooled_layers(duplicate) == ()
        assert torch.equal(run(duplicate, 60), alone(length=60))
        assert all(map(torch.equal, buffers(model), before))


def test_the_report_is_of_the_last_run(model: PreTrainedModel) -> None:
    handle = model.__dict__["_fierpatch_handle"]
    for length in (48, 60, 20):
        run(model, length)
        assert {layer.tokens for layer in handle.report().layers} == {length + 5}


def test_a_refused_run_leaves_the_report_of_the_one_before() -> None:
    model = small("gemma3")
    with fierpatch.apply(model, SETTINGS) as handle:
        run(model)
        before = str(handle.report())
        with pytest.raises(ConfigError, match="static"):
            run(model, prompt_lookup_num_tokens=3)
        assert str(handle.report()) == before


def test_compiled_runs_share_one_graph_and_one_set_of_layers(model: PreTrainedModel) -> None:
    """Also with the one that compiled, whose cache the compiler leaves in a cycle."""
    config = CompileConfig(fullgraph=True, dynamic=None, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # generate compiles on a GPU only, unless told
    torch._dynamo.reset()
    gc.collect()
    gc.disable()
    try:
        first = run(model, compile_config=config)
        before = addresses(model)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                assert torch.equal(run(model, compile_config=config), first)
                assert addresses(model) == before
                assert len(layer_caches()) == 2
                assert not [each for each in gc.get_objects() if type(each) is FierCache]
    finally:
        gc.enable()
        torch._dynamo.reset()
