"""A patch undoes itself: whatever happened while it was on, it leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor
from transformers import PreTrainedModel

import fierpatch
from fierpatch import FierConfig, FierError
from fierpatch.cache import LayerCache
from fierpatch.errors import ConfigError, TrainingModeError
from hf.fingerprint import fingerprint, registered, saved_files
from hf.models import prompt, tiny_model

SETTINGS = (
    FierConfig(budget=24, dense_layers=0),
    FierConfig(budget=21, dense_layers=1, index="fier", per_query_head=True),
    FierConfig(budget=30, dense_layers=0, bits=2, compile=True),
)
KINDS = ("llama", "gemma3")
TOKENS = prompt(48)


def small(family: str) -> PreTrainedModel:
    """A model of two layers, which has noted all that transformers itself notes at first use."""
    kinds = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"]}}
    model = tiny_model(family, num_hidden_layers=2, **kinds.get(family, {}))
    model.config.architectures = [type(model).__name__]  # as save_pretrained does
    model.config.dtype = model.dtype
    return model


def generate(model: PreTrainedModel, **options: Any) -> Tensor:
    output: Tensor = model.generate(TOKENS, max_new_tokens=6, **options)
    return output


@functools.cache
def alone(family: str, config: FierConfig | None) -> Tensor:
    """What a model under these settings generates when there is no other; None is unpatched."""
    model = small(family)
    if config is None:
        return generate(model)
    with fierpatch.apply(model, config):
        return generate(model)


@functools.cache
def pristine(family: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    model = small(family)
    return fingerprint(model), saved_files(model)


class Interruption(Exception):
    """Raised in the middle of what a test does."""


class Interrupt:
    """A logits processor and stopping criterion that raises at the third call."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == 3:
            raise self.error
        if isinstance(scores, Tensor):
            return scores
        return torch.zeros(len(input_ids), dtype=torch.bool)


@dataclass
class Slot:
    """A model of the machine, and what should be on it."""

    family: str
    model: PreTrainedModel
    config: FierConfig | None = None
    handle: fierpatch.Handle | None = None
    old_handles: list[fierpatch.Handle] = field(default_factory=list)

    def removed(self) -> None:
        if self.handle is not None:
            self.old_handles.append(self.handle)
        self.config = self.handle = None


numbers = st.integers(0, 7)
configs = st.sampled_from(SETTINGS)
interruptions = st.sampled_from((Interruption, KeyboardInterrupt))
errors = st.none() | interruptions


class Patches(RuleBasedStateMachine):
    """Patches come and go on several models, by every way there is."""

    @initialize()
    def start(self) -> None:
        self.registered = registered()
        self.slots = [Slot(family, small(family)) for family in (*KINDS, "llama")]
        for slot in self.slots:
            pristine(slot.family)

    def slot(self, number: int) -> Slot:
        return self.slots[number % len(self.slots)]

    @rule(number=numbers, config=configs)
    def apply(self, number: int, config: FierConfig) -> None:
        slot = self.slot(number)
        slot.removed()
        slot.handle, slot.config = fierpatch.apply(slot.model, config), config

    @rule(number=numbers, times=st.integers(1, 2), by_handle=st.booleans())
    def remove(self, number: int, times: int, by_handle: bool) -> None:
        slot = self.slot(number)
        handle = slot.handle
        for _ in range(times):
            if by_handle and handle is not None:
                handle.remove()
            else:
                fierpatch.remove(slot.model)
        slot.removed()

    @rule(number=numbers)
    def remove_by_an_old_handle(self, number: int) -> None:
        """It does nothing: that patch is off already."""
        for handle in self.slot(number).old_handles:
            assert not handle.is_attached
            handle.remove()

    @rule(number=numbers, config=configs, error=errors)
    def apply_for_a_block(
        self, number: int, config: FierConfig, error: type[BaseException] | None
    ) -> None:
        slot = self.slot(number)
        slot.removed()
        handle = fierpatch.apply(slot.model, config)
        with contextlib.suppress(Interruption, KeyboardInterrupt), handle:
            assert torch.equal(generate(slot.model), alone(slot.family, config))
            if error is not None:
                raise error
        slot.old_handles.append(handle)

    @rule(number=numbers)
    def run(self, number: int) -> None:
        slot = self.slot(number)
        assert torch.equal(generate(slot.model), alone(slot.family, slot.config))

    @rule(number=numbers, error=interruptions, where=st.sampled_from(("logits", "stopping")))
    def run_and_be_interrupted(self, number: int, error: type[BaseException], where: str) -> None:
        name = {"logits": "logits_processor", "stopping": "stopping_criteria"}[where]
        with pytest.raises(error):
            generate(self.slot(number).model, **{name: [Interrupt(error)]})

    @precondition(lambda self: any(slot.handle for slot in self.slots))
    @rule(number=numbers, error=errors)
    def disable_for_a_block(self, number: int, error: type[BaseException] | None) -> None:
        patched = [slot for slot in self.slots if slot.handle is not None]
        slot = patched[number % len(patched)]
        assert slot.handle is not None
        with contextlib.suppress(Interruption, KeyboardInterrupt), slot.handle.disabled():
            assert fingerprint(slot.model) == pristine(slot.family)[0]
            assert torch.equal(generate(slot.model), alone(slot.family, None))
            if error is not None:
                raise error
        assert slot.handle.is_attached

    @rule(number=numbers, is_training=st.booleans())
    def fail_to_apply(self, number: int, is_training: bool) -> None:
        """The patch that was on, if any, stays on."""
        slot = self.slot(number)
        if is_training:
            slot.model.train()
            with pytest.raises(TrainingModeError):
                fierpatch.apply(slot.model)
            slot.model.eval()
        else:
            with pytest.raises(ConfigError):
                fierpatch.apply(slot.model, bugdet=64)

    @precondition(lambda self: len(self.slots) < 5)
    @rule(number=numbers)
    def copy(self, number: int) -> None:
        slot = self.slot(number)
        duplicate = Slot(slot.family, copy.deepcopy(slot.model), slot.config)
        if slot.handle is not None:
            # Its own handle, found as `apply` and `remove` find it.
            duplicate.handle = duplicate.model.__dict__["_fierpatch_handle"]
            assert duplicate.handle is not slot.handle
            assert duplicate.handle.model is duplicate.model
        self.slots.append(duplicate)

    @precondition(lambda self: len(self.slots) > 2)
    @rule(number=numbers)
    def delete(self, number: int) -> None:
        """Patched or not."""
        self.slots.pop(number % len(self.slots))

    @rule(number=numbers)
    def save(self, number: int) -> None:
        slot = self.slot(number)
        assert saved_files(slot.model) == pristine(slot.family)[1]

    @invariant()
    def unpatched_models_are_as_they_were(self) -> None:
        for slot in self.slots:
            if slot.config is None:
                assert fingerprint(slot.model) == pristine(slot.family)[0]

    @invariant()
    def every_patch_has_one_pair_of_functions_registered(self) -> None:
        num_patched = 0
        for slot in self.slots:
            if slot.handle is not None:
                assert slot.handle.is_attached
                assert slot.handle.config == slot.config
                num_patched += 1
        new = registered() - self.registered
        assert len(new) == 2 * num_patched
        assert self.registered <= registered()

    def teardown(self) -> None:
        for slot in getattr(self, "slots", ()):
            fierpatch.remove(slot.model)


Patches.TestCase.settings = settings(stateful_step_count=20)
TestPatches = Patches.TestCase


def test_two_patched_models_never_meet() -> None:
    models = [small("llama") for _ in SETTINGS]
    for model, config in zip(models, SETTINGS, strict=True):
        fierpatch.apply(model, config)
    for model, config in zip(models, SETTINGS, strict=True):
        assert torch.equal(generate(model), alone("llama", config))
    fierpatch.remove(models[0])
    assert torch.equal(generate(models[0]), alone("llama", None))
    assert torch.equal(generate(models[1]), alone("llama", SETTINGS[1]))


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_the_implementation_that_was_chosen_comes_back(base: str) -> None:
    model = tiny_model("llama", base)
    fierpatch.apply(model).remove()
    assert model.config._attn_implementation == base


def test_an_implementation_chosen_while_patched_stays() -> None:
    model = tiny_model("llama", "sdpa")
    with fierpatch.apply(model):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_an_implementation_chosen_while_patched_needs_a_new_patch() -> None:
    """Instead of attending densely without a word."""
    model = tiny_model("llama", "sdpa", num_hidden_layers=2)
    fierpatch.apply(model, SETTINGS[0])
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="apply again"):
        generate(model)
    with fierpatch.apply(model, SETTINGS[0]):
        assert torch.equal(generate(model), alone("llama", SETTINGS[0]))
    assert model.config._attn_implementation == "eager"


def test_remove_in_a_disabled_block_is_for_good() -> None:
    model = small("llama")
    before = fingerprint(model), registered()
    handle = fierpatch.apply(model)
    with handle.disabled():
        handle.remove()
    assert not handle.is_attached
    assert (fingerprint(model), registered()) == before


def test_a_patch_put_on_in_a_disabled_block_stays() -> None:
    model = small("llama")
    first = fierpatch.apply(model, SETTINGS[0])
    with first.disabled():
        second = fierpatch.apply(model, SETTINGS[1])
    assert second.is_attached
    assert not first.is_attached
    assert torch.equal(generate(model), alone("llama", SETTINGS[1]))


def test_disabled_blocks_nest() -> None:
    model = small("llama")
    with fierpatch.apply(model, SETTINGS[0]) as handle:
        with handle.disabled():
            with handle.disabled():
                assert torch.equal(generate(model), alone("llama", None))
            assert torch.equal(generate(model), alone("llama", None))
        assert torch.equal(generate(model), alone("llama", SETTINGS[0]))


def test_a_static_run_leaves_nothing_but_what_the_unpatched_model_would() -> None:
    model = small("llama")
    before = fingerprint(model)
    with fierpatch.apply(model, SETTINGS[2]):
        generate(model)
        generate(model, cache_implementation="static")
        model.generate(prompt(4).repeat(1, 5), max_new_tokens=4, prompt_lookup_num_tokens=3)
        generate(model, num_beams=2)
        generate(model, assistant_early_exit=1)
    assert fingerprint(model) == before


def test_remove_where_there_is_no_patch_does_nothing() -> None:
    model = small("llama")
    before = fingerprint(model)
    fierpatch.remove(model)
    assert fingerprint(model) == before


def test_the_copy_of_a_patched_model_outlives_it() -> None:
    model = small("llama")
    fierpatch.apply(model, SETTINGS[0])
    duplicate = copy.deepcopy(model)
    del model
    assert torch.equal(generate(duplicate), alone("llama", SETTINGS[0]))
    fierpatch.remove(duplicate)
    assert fingerprint(duplicate) == pristine("llama")[0]


def test_a_handle_is_not_copied_without_its_model() -> None:
    model = small("llama")
    with fierpatch.apply(model) as handle, pytest.raises(FierError, match="model"):
        copy.deepcopy(handle)


def test_the_handle_of_a_deleted_model_says_so() -> None:
    handle = fierpatch.apply(small("llama"))
    with pytest.raises(FierError, match="deleted"):
        _ = handle.model
    handle.remove()
    assert not handle.is_attached
    assert "removed" in repr(handle)


def layer_caches() -> list[LayerCache]:
    """Every one alive."""
    return [each for each in gc.get_objects() if type(each) is LayerCache]


@pytest.mark.usefixtures("no_collector")
class TestMemory:
    @pytest.mark.parametrize("family", KINDS)
    @pytest.mark.parametrize("has_run", [False, True])
    def test_a_deleted_model_is_freed_at_once_patch_and_all(
        self, family: str, has_run: bool
    ) -> None:
        before = registered()
        model = small(family)
        handle = fierpatch.apply(model, SETTINGS[0])
        if has_run:
            generate(model)
            handle.report()
            with handle.disabled():
                generate(model)
        reference = weakref.ref(model)
        weight = weakref.ref(model.get_input_embeddings().weight)
        del model
        assert reference() is None
        assert weight() is None
        assert registered() == before

    @pytest.mark.parametrize("family", KINDS)
    @pytest.mark.parametrize("config", SETTINGS[:2], ids=["rotated", "fier"])
    def test_keys_and_values_are_freed_when_generate_returns(
        self, family: str, config: FierConfig
    ) -> None:
        model = small(family)
        with fierpatch.apply(model, config) as handle:
            generate(model)
            assert layer_caches() == []
            assert handle.report().kv_bytes > 0  # numbers outlive the tensors
            generate(model, num_beams=2)
            assert layer_caches() == []

    @pytest.mark.parametrize("config", SETTINGS, ids=["rotated", "fier", "static"])
    def test_a_cache_that_was_returned_is_freed_with_the_output(self, config: FierConfig) -> None:
        model = small("llama")
        with fierpatch.apply(model, config) as handle:
            output = generate(model, return_dict_in_generate=True)
            keys = weakref.ref(output.past_key_values.stores[1].keys)
            assert keys() is not None
            del output
            # Static layers stay for the next run, which finds them at the same addresses.
            assert (keys() is None) is not config.compile
            cache = handle.new_cache()
            generate(model, past_key_values=cache)
            keys = weakref.ref(cache.stores[1].keys)
            del cache
            assert keys() is None

    @pytest.mark.parametrize("family", KINDS)
    def test_static_keys_and_values_are_those_of_one_run_until_the_patch_goes(
        self, family: str
    ) -> None:
        model = small(family)
        with fierpatch.apply(model, SETTINGS[2]) as handle:
            generate(model)
            num_layers = len(layer_caches())
            generate(model)
            generate(model, num_beams=2)
            assert len(layer_caches()) == num_layers
        assert layer_caches() == []
        assert handle.report().kv_bytes > 0  # numbers outlive the tensors

    def test_keys_and_values_are_freed_after_an_exception(self) -> None:
        model = small("llama")
        with fierpatch.apply(model, SETTINGS[0]):
            with contextlib.suppress(Interruption):
                generate(model, logits_processor=[Interrupt(Interruption)])
            assert layer_caches() == []

    def test_growing_frees_the_smaller_buffers(self) -> None:
        model = small("llama")
        with fierpatch.apply(model, SETTINGS[0]) as handle, torch.no_grad():
            cache = handle.new_cache()
            model(prompt(512), past_key_values=cache)
            keys = weakref.ref(cache.stores[1].keys)
            model(prompt(1), past_key_values=cache)
            assert cache.stores[1].capacity == 1024
            assert keys() is None
