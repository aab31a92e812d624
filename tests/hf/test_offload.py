"""With K and V on the host a model gives the same logits, to the last bit, and keeps no memory."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import fierpatch
from fierpatch import FierCache, FierConfig
from fierpatch.errors import ConfigError, HostMemoryError
from fierpatch.hot_set import MISSED, PREFETCHED, USED
from fierpatch.offload import HostStore, memory
from fierpatch.offload.memory import HostMemory
from hf.agreement import RECORD, assert_agrees
from hf.models import left_padded, prompt, tiny_model
from hf.test_generate import MODES, converse, default_cache, static_cache

RESIDENT = FierConfig(budget=24, dense_layers=1)
# Little more room than the budget, so that rows leave at most steps.
OFFLOADED = RESIDENT.replace(offload=True, hot_tokens=30)
FAMILIES = (("llama", "sdpa"), ("gemma3", "sdpa"), ("gpt_oss", "eager"), ("qwen3", "sdpa"))
# Without a cache there is nothing to offload.
CACHED = [mode for mode in MODES if mode != "no cache"]

every_family = pytest.mark.parametrize(("family", "base"), FAMILIES)
Schedule = list[tuple[str, Any]]


def small(family: str, base: str) -> PreTrainedModel:
    """Of two layers that keep K and V on the host, at least."""
    if family != "gemma3":
        return tiny_model(family, base, num_hidden_layers=4 if family == "gpt_oss" else 3)
    kinds = ["sliding_attention", "full_attention"] * 2
    return tiny_model(family, base, num_hidden_layers=4, layer_types=kinds)


@functools.cache
def resident(family: str, base: str, mode: str) -> Any:
    """The output of a model that keeps K and V on the device."""
    model = small(family, base)
    with _many_graphs(), fierpatch.apply(model, RESIDENT):
        output = MODES[mode](model)
    # Not its cache, which would live as long as the tests.
    return SimpleNamespace(sequences=output.sequences, logits=output.logits)


def _many_graphs() -> Any:
    return torch._dynamo.config.patch(recompile_limit=8)  # which prefill in chunks raises for good


def assert_same_run(one: Any, other: Any) -> None:
    """Sequences and logits are equal to the last bit."""
    assert torch.equal(one.sequences, other.sequences)
    for left, right in zip(one.logits, other.logits, strict=True):
        assert torch.equal(left, right)


def tallies(cache: FierCache) -> Tensor:
    """The sums of what the hot sets of a cache counted."""
    hot = [store.hot for store in cache.stores.values() if store.hot is not None]
    return torch.stack([one.tally.sum((0, 1)) for one in hot]).sum(0)


@pytest.mark.parametrize("mode", CACHED)
@every_family
def test_every_mode_of_generate_gives_the_logits_of_the_device(
    family: str, base: str, mode: str
) -> None:
    model = small(family, base)
    with _many_graphs(), fierpatch.apply(model, OFFLOADED) as handle:
        output = MODES[mode](model)
        layers = handle.report().layers
    assert_same_run(output, resident(family, base, mode))
    assert {layer.kind for layer in layers if layer.host_bytes} == {"sparse"}
    assert all(layer.host_bytes == layer.kv_bytes for layer in layers if layer.kind == "sparse")
    counted = tallies(output.past_key_values)
    # With more than one query at each step, rows are read where they are.
    if not mode.startswith("prompt lookup"):
        assert 0 < counted[MISSED] < counted[USED]


@pytest.mark.parametrize(
    "mode",
    ["prefill in chunks as short as a step", "beam search", "prompt lookup", "static cache",
     "static cache, beam search"],
)  # fmt: skip
@every_family
def test_what_is_fetched_ahead_changes_no_logit(family: str, base: str, mode: str) -> None:
    model = small(family, base)
    with _many_graphs(), fierpatch.apply(model, OFFLOADED, prefetch=True):
        output = MODES[mode](model)
    assert_same_run(output, resident(family, base, mode))
    if mode != "prompt lookup":
        assert tallies(output.past_key_values)[PREFETCHED] > 0


@pytest.mark.parametrize("make_cache", [default_cache, static_cache])
@pytest.mark.parametrize(("family", "base"), FAMILIES[1:3])
def test_several_turns_give_the_logits_of_the_device(
    family: str, base: str, make_cache: Any
) -> None:
    outputs = []
    for config in (RESIDENT, OFFLOADED, OFFLOADED.replace(prefetch=True)):
        model = small(family, base)
        with fierpatch.apply(model, config):
            outputs.append(converse(make_cache)(model))
    for output in outputs[1:]:
        assert_same_run(output, outputs[0])


@pytest.mark.parametrize("mode", ["prompt lookup", "static cache, beam search"])
@pytest.mark.parametrize(("family", "base"), FAMILIES[1:3])
def test_with_budget_for_every_token_a_model_agrees_with_the_unpatched_one(
    family: str, base: str, mode: str
) -> None:
    assert_agrees(
        lambda: tiny_model(family, base), MODES[mode], offload=True, prefetch=True, dense_layers=0
    )


@pytest.mark.parametrize(
    "how", [{"per_query_head": True}, {"refine": 2}, {"index": "fier"}], ids=str
)
def test_every_selection_gives_the_logits_of_the_device(how: dict[str, Any]) -> None:
    outputs = []
    for config in (RESIDENT, OFFLOADED, OFFLOADED.replace(prefetch=True)):
        model = tiny_model("llama")
        with fierpatch.apply(model, config, **how):
            outputs.append(MODES["several samples"](model))
    for output in outputs[1:]:
        assert_same_run(output, outputs[0])


def test_steps_give_the_logits_of_the_device_while_the_cache_outgrows_its_room() -> None:
    outputs = []
    for config in (RESIDENT, OFFLOADED):
        model = tiny_model("qwen3")
        with fierpatch.apply(model, config):
            outputs.append(model.generate(prompt(500), max_new_tokens=25, **RECORD))
    assert_same_run(*outputs)


class TestOneCall:
    """By the name of a cache that transformers knows."""

    @pytest.mark.parametrize(
        ("name", "resident_name"), [("offloaded", None), ("offloaded_static", "static")]
    )
    def test_it_offloads_and_the_next_one_does_not(
        self, name: str, resident_name: str | None
    ) -> None:
        model = tiny_model("llama")
        run = functools.partial(
            model.generate, **left_padded(70, (0, 11)), max_new_tokens=8, **RECORD
        )
        with fierpatch.apply(model, RESIDENT) as handle:
            expected = run(cache_implementation=resident_name)
            assert handle.report().host_bytes == 0
            output = run(cache_implementation=name)
            sparse = handle.report().layers[1:]
            assert all(layer.host_bytes == layer.kv_bytes > 0 for layer in sparse)
            stores = output.past_key_values.stores.values()
            assert {store.is_static for store in stores} == {resident_name == "static"}
            assert_same_run(run(cache_implementation=resident_name), expected)
            assert handle.report().host_bytes == 0
        assert_same_run(output, expected)

    def test_it_is_refused_where_candidates_are_scored_by_their_keys(self) -> None:
        model = tiny_model("llama")
        options = {"refine": 2, "refine_bits": "exact"}
        refused = pytest.raises(ConfigError, match="refine_bits='exact'")
        with fierpatch.apply(model, RESIDENT, **options), refused:
            model.generate(prompt(40), max_new_tokens=2, cache_implementation="offloaded")


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, Schedule]:
    """The rows of a batch, a prompt, and what happens to it afterwards."""
    batch_size = draw(st.integers(1, 3))
    row = st.integers(0, batch_size - 1)
    any_rows = st.lists(row, min_size=batch_size, max_size=batch_size)
    actions = {
        "prompt": st.integers(9, 150),
        "steps": st.integers(1, 6),
        "verify": st.integers(2, 8),
        "crop": st.integers(0, 80),
        "reorder": any_rows,
        "start over": st.integers(25, 90),
    }
    one = st.sampled_from(list(actions)).flatmap(
        lambda name: st.tuples(st.just(name), actions[name])
    )
    first = st.tuples(st.just("prompt"), st.integers(25, 150))
    return batch_size, [draw(first), ("steps", 3), *draw(st.lists(one, max_size=7)), ("steps", 2)]


@torch.no_grad()
def follow(
    model: PreTrainedModel, cache: FierCache, batch_size: int, schedule: Schedule
) -> Iterator[Tensor]:
    """The logits of each forward pass of a schedule."""
    seeds = itertools.count()
    for name, argument in schedule:
        if name == "crop":
            # At least a token has to stay for what follows to be a step.
            removed = min(argument, int(cache.get_seq_length()) - 1)
            cache.crop(-removed)
        elif name == "reorder":
            cache.reorder_cache(torch.tensor(argument))
        else:
            if name == "start over":
                cache.reset()
            repeats, count = (argument, 1) if name == "steps" else (1, argument)
            for _ in range(repeats):
                tokens = prompt(count, batch_size, seed=next(seeds))
                yield model(tokens, past_key_values=cache).logits


@settings(max_examples=15)
@given(
    schedule=schedules(),
    is_static=st.booleans(),
    is_ahead=st.booleans(),
    per_query_head=st.booleans(),
    hot_tokens=st.sampled_from((None, 24, 40)),
)
@example(
    schedule=(1, [("prompt", 60), ("steps", 3), ("start over", 70), ("steps", 2)]),
    is_static=True,
    is_ahead=False,
    per_query_head=False,
    hot_tokens=None,
)
@example(
    schedule=(2, [("prompt", 500), ("steps", 20), ("crop", 15), ("reorder", [1, 1]), ("steps", 9)]),
    is_static=False,
    is_ahead=True,
    per_query_head=False,
    hot_tokens=24,
)
def test_any_conversation_gives_the_logits_of_the_device(
    schedule: tuple[int, Schedule],
    is_static: bool,
    is_ahead: bool,
    per_query_head: bool,
    hot_tokens: int | None,
) -> None:
    """Prompts, steps, drafts of a few tokens, crops, rows in another order, and a new start."""
    common = {"per_query_head": per_query_head, "compile": is_static}
    offload = {"offload": True, "prefetch": is_ahead, "hot_tokens": hot_tokens}
    results = []
    for config in (RESIDENT.replace(**common), RESIDENT.replace(**common, **offload)):
        model = tiny_model("llama", num_hidden_layers=3)
        with fierpatch.apply(model, config) as handle:
            cache = handle.new_cache(max_cache_len=1500 if is_static else 0)
            results.append(list(follow(model, cache, *schedule)))
    for offloaded, expected in zip(*results, strict=True):
        assert torch.equal(offloaded, expected)


def host_memories() -> list[HostMemory]:
    return [each for each in gc.get_objects() if type(each) is HostMemory]


@pytest.fixture
def _no_memories() -> None:
    """What other tests have left is gone."""
    gc.collect()
    assert host_memories() == []


def generate(model: PreTrainedModel, length: int = 60, **options: Any) -> Tensor:
    tokens: Tensor = model.generate(prompt(length), max_new_tokens=5, **options)
    return tokens


@pytest.mark.usefixtures("_no_memories")
class TestMemory:
    @pytest.mark.parametrize(("is_static", "is_ahead"), [(False, True), (True, False)])
    def test_ten_runs_take_that_of_one_and_give_it_back_with_the_patch(
        self, is_static: bool, is_ahead: bool
    ) -> None:
        """At the same addresses; no run waits for the cyclic collector."""
        model = tiny_model("llama")
        handle = fierpatch.apply(model, OFFLOADED, compile=is_static, prefetch=is_ahead)
        found = []
        gc.disable()
        try:
            for length in (60, 90, 40, 30, 60, 60, 60, 200, 400, 60):
                generate(model, length)
                found.append({(id(one), one.nbytes) for one in host_memories()})
        finally:
            gc.enable()
        assert len(found[0]) == 3, "of the layers that are not dense"
        assert found == found[:1] * 10
        # Static layers stay with the patch, the memory of growing ones alone.
        idle = handle._memory._idle
        held = {(id(one), one.nbytes) for one in idle}
        assert held == (set() if is_static else found[0])
        handle.remove()
        assert host_memories() == []
        assert handle._memory._idle == []

    @pytest.mark.parametrize("is_static", [False, True])
    def test_it_is_given_back_while_the_patch_is_disabled(self, is_static: bool) -> None:
        model = tiny_model("llama")
        with fierpatch.apply(model, OFFLOADED, compile=is_static) as handle:
            expected = generate(model)
            with handle.disabled():
                assert host_memories() == []
            assert torch.equal(generate(model), expected)
            assert len(host_memories()) == 3

    @pytest.mark.parametrize("is_static", [False, True])
    def test_it_goes_with_the_model_whoever_keeps_the_handle(self, is_static: bool) -> None:
        model = tiny_model("llama")
        handle = fierpatch.apply(model, OFFLOADED, compile=is_static, prefetch=True)
        generate(model)
        gc.collect()
        gc.disable()
        try:
            del model
            assert host_memories() == []
        finally:
            gc.enable()
        handle.remove()

    def test_a_cache_that_was_kept_outlives_the_patch_and_then_goes(self) -> None:
        model = tiny_model("llama")
        with fierpatch.apply(model, OFFLOADED):
            output = model.generate(prompt(60), max_new_tokens=5, return_dict_in_generate=True)
        cache = output.past_key_values
        del output
        assert len(host_memories()) == 3
        assert cache.stores[1].keys[:, :, :64].count_nonzero() == 64 * 2 * 16
        watched = weakref.ref(cache)
        del cache
        assert watched() is None
        assert host_memories() == []

    def test_caches_in_use_share_none(self) -> None:
        model = tiny_model("llama")
        with fierpatch.apply(model, OFFLOADED) as handle, torch.no_grad():
            caches = [handle.new_cache() for _ in range(2)]
            for seed, cache in enumerate(caches):
                model(prompt(60, seed=seed), past_key_values=cache)
            logits = [model(prompt(1), past_key_values=cache).logits for cache in caches]
            assert len(host_memories()) == 6
            for seed, expected in enumerate(logits):
                alone = handle.new_cache()
                model(prompt(60, seed=seed), past_key_values=alone)
                assert torch.equal(model(prompt(1), past_key_values=alone).logits, expected)

    @pytest.mark.parametrize("is_static", [False, True])
    def test_too_little_of_it_is_an_error_that_the_next_run_does_not_feel(
        self, is_static: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model("llama")
        with fierpatch.apply(model, OFFLOADED, compile=is_static) as handle:
            with monkeypatch.context() as patch:
                patch.setattr(memory, "available", lambda: 1000)
                with pytest.raises(HostMemoryError, match="1000 are free"):
                    generate(model)
            assert handle.is_attached
            found = generate(model)
        fresh = tiny_model("llama")
        with fierpatch.apply(fresh, OFFLOADED, compile=is_static):
            assert torch.equal(generate(fresh), found)


@pytest.mark.parametrize(("is_static", "is_ahead"), [(False, True), (True, False)])
@pytest.mark.parametrize("num_passes", [1, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_run_that_is_broken_off_spoils_no_later_one(
    error: type[BaseException], num_passes: int, is_static: bool, is_ahead: bool
) -> None:
    """In the middle of its prompt, or of a step: between the layers."""
    model = tiny_model("llama")
    config = OFFLOADED.replace(compile=is_static, prefetch=is_ahead)
    with fierpatch.apply(model, config) as handle:
        expected = generate(model)
        memories = {id(one) for one in host_memories()}
        passes = itertools.count(1)

        def interrupt(*args: Any) -> None:
            if next(passes) == num_passes:
                raise error("in the middle of a run")

        hook = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(error, match="in the middle of a run"):
            generate(model, 90)
        hook.remove()
        assert handle.is_attached
        gc.collect()
        assert {id(one) for one in host_memories()} <= memories
        for _ in range(2):
            assert torch.equal(generate(model), expected)


def test_a_later_prompt_has_each_layer_read_while_the_one_before_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that none waits for its own rows, and no more than one layer's are there unused."""
    log: list[tuple[str, HostStore]] = []
    for name in ("read", "read_ahead"):
        call = getattr(HostStore, name)

        def logged(store: HostStore, *arguments: Any, name: str = name, call: Any = call) -> Any:
            log.append((name, store))
            return call(store, *arguments)

        monkeypatch.setattr(HostStore, name, logged)
    model = tiny_model("llama")
    with fierpatch.apply(model, OFFLOADED) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(40), past_key_values=cache)
        assert not log
        model(prompt(30), past_key_values=cache)
    stores = [layer.store for layer in cache.stores.values() if layer.is_offloaded]
    assert log == [(name, store) for store in stores for name in ("read_ahead", "read")]
