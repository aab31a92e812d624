"""Each layer has the next one fetch ahead, by the query that this would have if it changed nothing.

What fetches is replaced by what records: here the estimate is tested, and when it is asked for.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

import fierpatch
from fierpatch import FierConfig
from fierpatch.cache import LayerCache
from fierpatch.errors import FierError, ModelError, UnsupportedModelError
from fierpatch.hf import lookahead
from fierpatch.hot_set import HotSet
from fierpatch.ops.reference_operators import ReferenceOperators
from fierpatch.query_estimate import QueryEstimate
from hf.any_model import any_model
from hf.fingerprint import fingerprint, registered
from hf.models import FAMILIES, left_padded, prompt, tiny_model

SETTINGS = FierConfig(budget=24, dense_layers=0, offload=True, prefetch=True)
NUM_STEPS = 5
# One of each way to make a query, beside the families: no RoPE in some layers, RoPE of a part of
# each head, a norm over all heads at once, one without weights.
OTHERS = ("cohere", "cohere2", "glm4", "nanochat", "olmoe", "smollm3", "starcoder2")
# A fused or gated projection, a norm after it, or RoPE or a norm where they are not looked for.
REFUSED = ("gpt2", "gpt_neox", "hunyuan_v1_dense", "olmo2", "phi", "phi3", "qwen3_next", "stablelm")

Estimates = list[tuple[LayerCache, Tensor]]


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> Estimates:
    """What layers were asked to fetch by, in order."""
    recorded: Estimates = []

    def record(layer: LayerCache, estimate: QueryEstimate) -> None:
        assert estimate.query().shape == estimate.size
        recorded.append((layer, estimate.query().clone()))

    monkeypatch.setattr(LayerCache, "prefetch", record)
    return recorded


@pytest.fixture
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def idle(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, each of whose layers attends, and then passes on what entered it."""

    def pass_on(module: Any, inputs: Any, output: Any) -> Any:
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    for layer in model.get_decoder().layers:
        layer.register_forward_hook(pass_on)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases, which are all alike in a new model
                weight.normal_()
    return model


@torch.no_grad()
def decode(model: PreTrainedModel, handle: fierpatch.Handle) -> list[tuple[int, Tensor]]:
    """A prompt with padding, then single tokens: the true queries, by layer and in order."""
    cache = handle.new_cache()
    numbers = {id(store): number for number, store in cache.stores.items()}
    queries: list[tuple[int, Tensor]] = []
    cache.observe(lambda layer, query, *rest: queries.append((numbers[id(layer)], query.clone())))
    inputs = left_padded(40 + NUM_STEPS, (0, 9))
    for start, stop in [(0, 40), *((stop - 1, stop) for stop in range(41, 41 + NUM_STEPS))]:
        mask = inputs["attention_mask"][:, :stop]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
        model(
            inputs["input_ids"][:, start:stop],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    return queries


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_estimate_is_the_query_where_the_layer_before_changes_nothing(
    family: str, estimates: Estimates
) -> None:
    """Each query but the first layer's is estimated, in order, and to rounding."""
    model = idle(tiny_model(family) if family in FAMILIES else any_model(family))
    with fierpatch.apply(model, SETTINGS) as handle:
        queries = [query for number, query in decode(model, handle) if number > 0]
    assert len(estimates) == len(queries) > 0
    for (_, estimate), query in zip(estimates, queries, strict=True):
        assert estimate.shape == query.shape
        rounding = 4 * torch.finfo(query.dtype).eps * query.abs().max()
        assert (estimate - query).abs().max() <= rounding


def test_each_offloaded_layer_is_asked_once_a_step_and_never_for_a_prompt(
    estimates: Estimates,
) -> None:
    model = tiny_model("llama")
    with fierpatch.apply(model, SETTINGS, dense_layers=2) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(40), past_key_values=cache)
        model(prompt(30), past_key_values=cache)
        model(prompt(3), past_key_values=cache)  # as in assisted decoding
        assert not estimates
        for step in range(1, 4):
            model(prompt(1), past_key_values=cache)
            layers = [layer for layer, _ in estimates]
            assert layers == [cache.stores[2], cache.stores[3]] * step


def test_rope_of_a_step_is_worked_out_for_its_first_estimate_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A query with a norm is estimated whole, so there is none to share."""
    prefetch = LayerCache.prefetch
    recorded: list[QueryEstimate] = []

    def record(layer: LayerCache, estimate: QueryEstimate) -> None:
        recorded.append(estimate)
        prefetch(layer, estimate)

    monkeypatch.setattr(LayerCache, "prefetch", record)
    for family in ("llama", "qwen3"):
        recorded.clear()
        model = tiny_model(family)
        with fierpatch.apply(model, SETTINGS):
            model.generate(prompt(40), max_new_tokens=4)
        rotations = [estimate.rotation for estimate in recorded]
        steps = [rotations[start : start + 3] for start in range(0, len(rotations), 3)]
        assert len(steps) == 3
        if family == "qwen3":
            assert not any(estimate.weight is not None for estimate in recorded)
            continue
        for step in steps:
            assert step[0] is not None
            assert all(rotation is step[0] for rotation in step)
        assert steps[0][0] is not steps[1][0]


def log_starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, LayerCache]]:
    """What layers begin, in order: to place, to fetch, to wait for both, to store and to attend."""
    log: list[tuple[str, LayerCache]] = []
    operators = ReferenceOperators
    names = {"place_ahead": "place", "fetch_ahead": "fetch", "await_fetched": "await fetch"}
    layers: dict[int, LayerCache] = {}

    def logged(name: str) -> Any:
        call = getattr(operators, name)

        def log_it(self: ReferenceOperators, *arguments: Any) -> Any:
            hot = next(each for each in arguments if isinstance(each, HotSet))
            log.append((names[name], layers[id(hot.tally)]))
            return call(self, *arguments)

        return log_it

    attend, store_step = LayerCache.attend, LayerCache._store_step
    await_placed = LayerCache._await_placed

    def attend_it(layer: LayerCache, query: Tensor, **options: Any) -> Any:
        log.append(("attend", layer))
        return attend(layer, query, **options)

    def await_it(layer: LayerCache, *arguments: Any) -> Any:
        log.append(("await place", layer))
        return await_placed(layer, *arguments)

    def store_it(layer: LayerCache, *arguments: Any) -> Any:
        log.append(("store", layer))
        return store_step(layer, *arguments)

    for name in names:
        monkeypatch.setattr(operators, name, logged(name))
    monkeypatch.setattr(LayerCache, "attend", attend_it)
    monkeypatch.setattr(LayerCache, "_await_placed", await_it)
    monkeypatch.setattr(LayerCache, "_store_step", store_it)
    prefetch = LayerCache.prefetch

    def prefetch_it(layer: LayerCache, estimate: QueryEstimate) -> None:
        assert layer.hot is not None
        layers[id(layer.hot.tally)] = layer
        prefetch(layer, estimate)

    monkeypatch.setattr(LayerCache, "prefetch", prefetch_it)
    return log


@pytest.mark.parametrize("start", ["mlp", "attention", "never"])
def test_a_layer_places_while_the_one_before_stores_and_fetches_when_that_has_attended(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its MLP if it has one of that name; what was placed and not called for comes last."""
    log: list[tuple[str, Any]] = log_starts(monkeypatch)
    if start == "attention":
        monkeypatch.setattr(lookahead, "_AFTER_ATTENTION", ("ffn",))
    model = tiny_model("llama")
    with fierpatch.apply(model, SETTINGS, dense_layers=2) as handle, torch.no_grad():
        if start == "never":
            for hook in handle._lookahead._starts:
                hook.remove()
        mlp = model.model.layers[2].mlp
        mlp.register_forward_pre_hook(lambda *_: log.append(("mlp", None)))
        cache = handle.new_cache()
        model(prompt(40), past_key_values=cache)
        log.clear()
        model(prompt(1), past_key_values=cache)
    of_last = [name for name, layer in log if layer in (cache.stores[3], None)]
    order = {
        "mlp": ["place", "fetch", "mlp", "await place", "store", "attend", "await fetch"],
        "attention": ["place", "fetch", "mlp", "await place", "store", "attend", "await fetch"],
        "never": ["place", "mlp", "await place", "store", "attend", "fetch", "await fetch"],
    }
    assert of_last == order[start]
    stored, attended = (log.index((name, cache.stores[2])) for name in ("store", "attend"))
    assert log.index(("place", cache.stores[3])) < stored
    assert attended < log.index(("fetch", cache.stores[3]))


def test_nothing_is_on_its_way_to_buffers_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that goes on would write where they were."""
    starts: list[bool] = []
    resize, is_late = HotSet.resize, []

    def resize_it(hot: HotSet, capacity: int) -> HotSet:
        layers = [layer for layer in cache.stores.values() if layer.hot is hot]
        is_late.extend(layer._started is not None for layer in layers)
        return resize(hot, capacity)

    place_ahead = LayerCache._place_ahead

    def place_it(layer: LayerCache, before: Tensor | None) -> None:
        place_ahead(layer, before)
        starts.append(layer._started is not None)

    monkeypatch.setattr(HotSet, "resize", resize_it)
    monkeypatch.setattr(LayerCache, "_place_ahead", place_it)
    model = tiny_model("llama")
    with fierpatch.apply(model, SETTINGS) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(510), past_key_values=cache)
        for _ in range(4):
            model(prompt(1), past_key_values=cache)
    assert any(starts)
    assert is_late
    assert not any(is_late)


def test_a_step_that_breaks_off_before_it_fetches_keeps_no_cache() -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    model = tiny_model("llama")
    with fierpatch.apply(model, SETTINGS) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(40), past_key_values=cache)
        hook = model.model.layers[1].self_attn.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(1), past_key_values=cache)
        hook.remove()
        gone = weakref.ref(cache.stores[2])
        del cache
        gc.collect()
        assert gone() is None
        model.generate(prompt(40), max_new_tokens=3)


def test_only_a_cache_that_is_to_fetch_ahead_is_asked(estimates: Estimates) -> None:
    model = tiny_model("llama")
    resident = SETTINGS.replace(prefetch=False, offload=False)
    with fierpatch.apply(model, SETTINGS) as handle:
        for settings in (SETTINGS.replace(prefetch=False), resident):
            cache = fierpatch.FierCache(model.config, settings)
            model.generate(prompt(40), past_key_values=cache, max_new_tokens=4)
        model.generate(prompt(40), max_new_tokens=4, use_cache=False)
        with handle.disabled():
            model.generate(prompt(40), max_new_tokens=4)
        assert not estimates
        model.generate(prompt(40), max_new_tokens=4)
        assert estimates


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_is_refused_keeps_the_patch_it_had(model_type: str) -> None:
    model = any_model(model_type)
    with fierpatch.apply(model, dense_layers=0) as handle:
        before = fingerprint(model), registered()
        with pytest.raises(UnsupportedModelError, match="prefetch=False"):
            fierpatch.apply(model, SETTINGS)
        assert handle.is_attached
        # Under other names, since it was taken off to look at the model beneath.
        assert len(registered()) == len(before[1])
        assert fingerprint(model)["hooks"] == before[0]["hooks"]
        assert fingerprint(model)["attributes"] == before[0]["attributes"]


def test_weights_that_come_and_go_are_refused() -> None:
    """As those of a layer that accelerate loads for the time it runs."""
    model = tiny_model("llama").to("meta")
    fierpatch.apply(model, SETTINGS, prefetch=False).remove()
    with pytest.raises(UnsupportedModelError, match="prefetch=False"):
        fierpatch.apply(model, SETTINGS)


class TestUndo:
    def test_nothing_stays(self, estimates: Estimates) -> None:
        model = tiny_model("llama")
        model.generate(prompt(40), max_new_tokens=3)
        before = fingerprint(model), registered()
        handle = fierpatch.apply(model, SETTINGS)
        patched = fingerprint(model)["hooks"]
        assert patched != before[0]["hooks"]
        with handle.disabled():
            assert (fingerprint(model), registered()) == before
        assert fingerprint(model)["hooks"] == patched
        again = fierpatch.apply(model, SETTINGS)
        assert fingerprint(model)["hooks"] == patched
        handle.remove()
        assert fingerprint(model)["hooks"] == patched
        model.generate(prompt(40), max_new_tokens=3)
        again.remove()
        assert (fingerprint(model), registered()) == before

    def test_a_copy_has_hooks_of_its_own(self, estimates: Estimates) -> None:
        model = tiny_model("gemma3")
        before = fingerprint(model)
        handle = fierpatch.apply(model, SETTINGS)
        duplicate = copy.deepcopy(model)
        assert fingerprint(duplicate)["hooks"] == fingerprint(model)["hooks"]
        with torch.no_grad():
            duplicate.model.layers[1].self_attn.q_proj.weight.zero_()
        decode(model, handle)
        assert all(query.any() for _, query in estimates)
        estimates.clear()
        handle.remove()
        assert fingerprint(model) == before
        copied = duplicate.__dict__["_fierpatch_handle"]
        decode(duplicate, copied)
        assert [bool(query.any()) for _, query in estimates] == [False, True, True] * NUM_STEPS
        copied.remove()
        assert fingerprint(duplicate)["hooks"] == before["hooks"]

    def test_a_deep_model_can_be_copied(self) -> None:
        """Each hook knows the next layer, which has a hook."""
        model = tiny_model("llama", num_hidden_layers=150)
        with fierpatch.apply(model, SETTINGS):
            fierpatch.remove(copy.deepcopy(model))

    def test_a_copied_part_of_a_model_fetches_nothing(self, estimates: Estimates) -> None:
        model = tiny_model("llama")
        with fierpatch.apply(model, SETTINGS) as handle:
            part = copy.deepcopy(model.model)
            model.model = part
            decode(model, handle)
        assert not estimates

    def test_a_part_of_a_patched_model_is_not_pickled(self) -> None:
        model = tiny_model("llama")
        with fierpatch.apply(model, SETTINGS), pytest.raises(FierError, match="pickled"):
            pickle.dumps(model.model)

    def test_a_deleted_model_is_freed_at_once(self, estimates: Estimates) -> None:
        model = tiny_model("gemma3")
        handle = fierpatch.apply(model, SETTINGS)
        model.generate(prompt(40), max_new_tokens=3)
        estimates.clear()
        gc.collect()
        gc.disable()
        try:
            weights = [weakref.ref(weight) for weight in model.parameters()]
            layers = [weakref.ref(layer) for layer in model.model.layers]
            del model
            assert not [each for each in (*weights, *layers) if each() is not None]
        finally:
            gc.enable()
        handle.remove()

    def test_a_model_changed_while_disabled_is_looked_at_again(self) -> None:
        model = tiny_model("llama")
        handle = fierpatch.apply(model, SETTINGS)
        layers = model.model.layers
        with pytest.raises(ModelError, match="layer 1"), handle.disabled():
            del model.model.layers
        assert not handle.is_attached
        model.model.layers = layers
        handle.remove()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(("family", "num_graphs"), [("llama", 1), ("qwen3", 1), ("gemma3", 2)])
def test_a_step_with_its_estimates_is_one_graph(
    family: str, num_graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as without; see the tests of compiling."""

    def keep(self: LayerCache, estimate: QueryEstimate) -> None:
        self.facts.__dict__["estimate"].copy_(estimate.query())

    monkeypatch.setattr(LayerCache, "prefetch", keep)
    model = tiny_model(family)
    heads, head_dim = model.config.num_attention_heads, model.config.head_dim

    @torch.no_grad()
    def run(step: Any, handle: fierpatch.Handle) -> list[Tensor]:
        cache = handle.new_cache(60)
        kept = [torch.zeros(1, heads, 1, head_dim) for _ in cache.stores]
        for store, estimate in zip(cache.stores.values(), kept, strict=True):
            torch._dynamo.mark_static_address(estimate, guard=False)
            store.facts.__dict__["estimate"] = estimate
        model(prompt(40), past_key_values=cache)
        results = []
        for token in prompt(NUM_STEPS)[0]:
            results.append(step(token[None, None], past_key_values=cache).logits)
            results += [estimate.clone() for estimate in kept]
        assert kept[-1].any()
        return results

    with fierpatch.apply(model, SETTINGS, compile=True) as handle:
        eager = run(model.forward, handle)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = run(torch.compile(model.forward, fullgraph=True, backend=counter), handle)
    assert counter.frame_count == num_graphs
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other)
