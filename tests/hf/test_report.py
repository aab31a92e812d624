"""The report and the estimate say what is there: kinds, reasons, tokens and bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fierpatch
from fierpatch import FierCache, FierConfig, hot_set
from fierpatch.errors import ConfigError
from fierpatch.hot_set import ASKED, CLOCK, MISSED, NEEDED, PREFETCHED, USED, USEFUL
from fierpatch.offload.residency import Residency
from hf.models import WINDOW, prompt, tiny_config, tiny_model

INDEXES = st.sampled_from(
    (
        {"index": "rotated"},
        {"index": "rotated", "bits": 2},
        {"index": "rotated", "refine": 4, "refine_bits": 3},
        {"index": "fier", "refine": 4, "refine_bits": "exact"},
    )
)


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def index_nbytes(cache: FierCache, number: int) -> int:
    """Bytes of a layer's index, without the constants that all layers could share."""
    store = cache.stores[number]
    if store.index is None:
        return 0
    return nbytes(*store.state[: len(store.state) - store.index.num_constants])


def test_every_layer_has_its_kind_and_the_reason() -> None:
    model = tiny_model("gemma3")
    with fierpatch.apply(model, budget=64, bits=2) as handle:
        layers = handle.report().layers
    assert [layer.number for layer in layers] == list(range(6))
    kinds = ["sliding", "dense", "sliding", "sparse", "sliding", "sparse"]
    assert [layer.kind for layer in layers] == kinds
    for layer in layers:
        words = {"sliding": f"sees {WINDOW}", "dense": "dense_layers=2", "sparse": "2 bit"}
        assert words[layer.kind] in layer.reason


def test_before_any_run_there_is_nothing_to_count() -> None:
    model = tiny_model("gemma3")
    with fierpatch.apply(model, budget=64) as handle:
        report = handle.report()
    assert report.kv_bytes == report.index_bytes == report.bytes_read == 0
    assert report.active_fraction == 1.0
    assert all(layer.tokens == layer.tokens_attended == 0 for layer in report.layers)
    assert {layer.backend for layer in report.layers} == {""}
    assert "total" in str(report)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_and_bytes_are_those_of_the_tensors(is_static: bool, dtype: torch.dtype) -> None:
    model = tiny_model("gemma3").to(dtype)
    settings = FierConfig(budget=64, compile=is_static)
    with fierpatch.apply(model, settings) as handle:
        options = {"max_new_tokens": 10, "return_dict_in_generate": True}
        cache = model.generate(prompt(505, 2), **options).past_key_values
        report = handle.report()
        assert handle.report(cache) == report
    for number, store in cache.stores.items():
        layer = report.layers[number]
        assert layer.tokens == cache.get_seq_length(number) == 514
        assert layer.kv_bytes == store.facts.kv_nbytes == nbytes(store.keys, store.values)
        assert layer.index_bytes == store.facts.index_nbytes == index_nbytes(cache, number)
        assert store.facts.itemsize == dtype.itemsize
    assert report.kv_bytes == sum(layer.kv_bytes for layer in report.layers)
    assert report.index_bytes == sum(index_nbytes(cache, number) for number in cache.stores)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("per_query_head", [False, True])
def test_what_is_offloaded_is_counted_where_it_is(is_static: bool, per_query_head: bool) -> None:
    model = tiny_model("gemma3").to(torch.bfloat16)
    settings = FierConfig(
        budget=64, offload=True, hot_tokens=70, compile=is_static, per_query_head=per_query_head
    )
    with fierpatch.apply(model, settings) as handle:
        options = {"max_new_tokens": 10, "return_dict_in_generate": True}
        cache = model.generate(prompt(505, 2), **options).past_key_values
        report = handle.report()
        assert handle.report(cache) == report
    sliding = [layer for layer in report.layers if layer.kind == "sliding"]
    on_device = sum(layer.kv_bytes for layer in sliding)
    for number, store in cache.stores.items():
        layer = report.layers[number]
        held = nbytes(store.keys, store.values)
        assert layer.kv_bytes == held
        assert layer.host_bytes == (0 if layer.kind == "dense" else held)
        on_device += held - layer.host_bytes + index_nbytes(cache, number)
        if layer.kind == "dense":
            assert (store.hot, layer.hot_bytes, layer.hit_rate) == (None, 0, None)
        else:
            assert layer.hot_bytes == nbytes(*store.hot.tensors)
            assert store.hot.rows.shape[:3] == (2, 4 if per_query_head else 2, 70)
            on_device += layer.hot_bytes
    assert report.host_bytes == sum(layer.host_bytes for layer in report.layers) > 0
    assert report.device_bytes == on_device


def test_what_was_fetched_is_what_the_policy_did_not_have_in_its_rows() -> None:
    """By the lists that were selected, of each row of the batch and each KV head."""
    model = tiny_model("llama")
    lists: dict[int, list[list[Residency]]] = {}
    fetched: dict[int, int] = {}

    def observe(layer: Any, query: Any, token_indices: torch.Tensor, *rest: Any) -> None:
        of_rows = lists.setdefault(id(layer), [[Residency(30) for _ in "12"] for _ in "12"])
        for row, residencies in enumerate(of_rows):
            for head, residency in enumerate(residencies):
                placement = residency.place(token_indices[row, head, 0].tolist())
                fetched[id(layer)] = fetched.get(id(layer), 0) + len(placement.misses)

    with fierpatch.apply(model, budget=24, offload=True, hot_tokens=30) as handle:
        cache = handle.new_cache()
        cache.observe(observe)
        model.generate(prompt(200, 2), max_new_tokens=9, past_key_values=cache)
        report = handle.report()
    num_selected, row = 8 * 2 * 2 * 24, 2 * 16 * 4
    rates = []
    for number in (2, 3):
        layer, missed = report.layers[number], fetched[id(cache.stores[number])]
        assert 0 < missed < num_selected
        rates.append(1 - missed / num_selected)
        assert layer.hit_rate == rates[-1]
        assert layer.bytes_fetched == missed * row / 8
        assert layer.prefetch_accuracy is None
    assert report.hit_rate == sum(rates) / 2
    assert report.bytes_fetched == sum(fetched.values()) * row / 8
    assert report.prefetch_accuracy is None


@pytest.mark.parametrize("pays_from", [0.0, 2.0])
def test_nothing_is_asked_for_ahead_where_it_does_not_pay(
    pays_from: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_set, "PAYS_FROM", pays_from)
    model = tiny_model("llama")
    options = {"budget": 24, "offload": True, "hot_tokens": 30, "prefetch": True}
    with fierpatch.apply(model, **options) as handle:
        cache = handle.new_cache()
        model.generate(prompt(200), max_new_tokens=9, past_key_values=cache)
    for number in (2, 3):
        counts = cache.stores[number].hot.tally.sum((0, 1))
        assert bool(counts[ASKED]) == bool(counts[PREFETCHED]) == (pays_from == 0.0)
        assert counts[USEFUL] + counts[MISSED] >= counts[NEEDED] > 0


def test_what_was_fetched_ahead_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of a step its own token is not there to be asked for."""
    monkeypatch.setattr(hot_set, "PAYS_FROM", 0.0)
    model = tiny_model("llama")
    options = {"budget": 24, "offload": True, "hot_tokens": 60, "prefetch": True}
    with fierpatch.apply(model, **options) as handle:
        cache = handle.new_cache()
        model.generate(prompt(20), max_new_tokens=9, past_key_values=cache)
        report = handle.report()
    row = 2 * 16 * 4
    num_used, num_asked = (2 * sum(min(start + n, 24) for n in range(8)) for start in (21, 20))
    for number in (2, 3):
        layer, hot = report.layers[number], cache.stores[number].hot
        counts = hot.tally.sum((0, 1))
        assert (hot.tally[..., CLOCK] == 8).all()
        assert (counts[USED], counts[ASKED]) == (num_used, num_asked)
        assert counts[PREFETCHED] > 0
        assert layer.hit_rate == 1 - counts[MISSED].item() / num_used
        assert layer.bytes_fetched == (counts[MISSED] + counts[PREFETCHED]).item() * row / 8
        assert layer.prefetch_accuracy == counts[USEFUL].item() / num_asked
        assert 0 < layer.prefetch_accuracy <= 1
    last = str(report).splitlines()[-1]
    assert last.endswith(f", prefetches {report.prefetch_accuracy:.1%}")


def test_a_table_says_what_is_on_the_host_and_what_was_fetched_from_there() -> None:
    model = tiny_model("llama")
    with fierpatch.apply(model, budget=24, offload=True) as handle, torch.no_grad():
        assert "offload" not in str(handle.report()), "nothing was stored yet"
        cache = handle.new_cache()
        model(prompt(500), past_key_values=cache)
        last = str(handle.report()).splitlines()[-1]
        assert last.startswith("offload: 256.0 KiB of KV on the host, ")
        assert last.endswith(" in all on the device")
        model(prompt(1), past_key_values=cache)
        last = str(handle.report()).splitlines()[-1]
        # All 24 rows of two lists in two layers, none of which was there before.
        assert last.endswith("; fetches 12.0 KiB a step, hits 0.0%")
    with fierpatch.apply(model, budget=24) as handle:
        model.generate(prompt(20), max_new_tokens=2)
        assert "offload" not in str(handle.report())
    assert "offload: " in str(fierpatch.estimate(model, 500, budget=24, offload=True))


@pytest.mark.parametrize("is_static", [False, True])
def test_what_is_offloaded_stays_reported_when_the_patch_is_gone(is_static: bool) -> None:
    model = tiny_model("llama")
    handle = fierpatch.apply(model, budget=24, offload=True, compile=is_static)
    model.generate(prompt(60), max_new_tokens=4)
    report = handle.report()
    handle.remove()
    assert handle.report() == report


def test_numbers_outlive_the_cache_and_the_next_run_replaces_them() -> None:
    model = tiny_model("llama")
    with fierpatch.apply(model, budget=64) as handle:
        model.generate(prompt(100), max_new_tokens=3)
        assert handle.report().layers[3].tokens == 102
        model.generate(prompt(20), max_new_tokens=3)
        assert handle.report().layers[3].tokens == 22


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_sparse_layer_names_the_backend_that_ran_it(backend: str, is_static: bool) -> None:
    model = tiny_model("gemma3")
    with fierpatch.apply(model, budget=64, backend=backend, compile=is_static) as handle:
        model.generate(prompt(100), max_new_tokens=3)
        report = handle.report()
    backends = [layer.backend for layer in report.layers]
    assert backends == ["", "", "", "reference", "", "reference"]
    sparse = [line for line in str(report).splitlines() if "sparse" in line]
    reason = "rotated index, 1 bit, one list a KV head, reference"
    assert sparse
    assert all(line.endswith(reason) for line in sparse)


def test_layers_that_different_backends_ran_do_not_share_a_line() -> None:
    model = tiny_model("llama")
    with fierpatch.apply(model, budget=64, dense_layers=0) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            model(prompt(100), past_key_values=cache)
        cache.facts[3].backend = "triton"
        text = str(handle.report(cache))
    ends = [line.rsplit(None, 1)[-1] for line in text.splitlines()[1:-1]]
    assert ends == ["reference", "triton"]


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({}, 0),
        ({"refine": 2, "refine_bits": 4}, 4 * 16 / 8 + 1 + 2),  # all bits, the ratio, the scale
        ({"refine": 2, "refine_bits": "exact"}, 16 * 4),
    ],
    ids=["one bit", "codes", "keys"],
)
def test_a_step_reads_the_index_and_the_budget_of_a_sparse_layer(
    settings: dict[str, Any], again: float, per_query_head: bool
) -> None:
    """And of a dense or sliding one, the K and V of the tokens it sees."""
    model = tiny_model("gemma3")
    with fierpatch.apply(model, budget=50, per_query_head=per_query_head, **settings) as handle:
        model.generate(prompt(199), max_new_tokens=2)
        report = handle.report()
    row = 2 * 16 * 4  # K and V of 16 channels in float32
    heads, groups = 2, 2
    sparse, dense, sliding = (report.layers[number] for number in (3, 1, 0))
    assert (sparse.tokens_attended, dense.tokens_attended) == (50, 200)
    assert sliding.tokens_attended == WINDOW
    scanned = 200 * (16 / 8 + 2 + 2 * 16 / 128)  # bits, a scale, a share of the group's centre
    lists = groups if per_query_head else 1
    refined = lists * 100 * again
    assert sparse.bytes_scanned == heads * scanned
    assert sparse.bytes_refined == heads * refined
    assert sparse.bytes_attended == heads * lists * 50 * row
    assert sparse.bytes_read == heads * (scanned + refined + lists * 50 * row)
    assert sparse.bytes_read_dense == dense.bytes_read == heads * 200 * row
    assert sliding.bytes_read == sliding.bytes_read_dense == heads * WINDOW * row
    for layer in (dense, sliding):
        assert (layer.bytes_scanned, layer.bytes_refined) == (0, 0)
        assert layer.bytes_attended == layer.bytes_read
    keys_read = scanned + refined + lists * 50 * row / 2
    assert sparse.key_access_ratio == keys_read / (200 * row / 2)
    assert report.active_fraction == 50 / 200


@given(
    context=st.integers(1, 5000),
    batch=st.integers(1, 3),
    index=INDEXES,
    dense_layers=st.integers(0, 5),
    family=st.sampled_from(("llama", "qwen3", "gemma3")),
)
def test_what_a_step_reads_is_what_it_scans_refines_and_attends(
    context: int, batch: int, index: dict[str, Any], dense_layers: int, family: str
) -> None:
    """Layer by layer and in all; only sparse layers scan, and only with refine are keys refined."""
    options = {"budget": 64, "dense_layers": dense_layers, **index}
    report = fierpatch.estimate(tiny_config(family), context, batch, **options)
    for found in (report, *report.layers):
        parts = found.bytes_scanned, found.bytes_refined, found.bytes_attended
        assert sum(parts) == found.bytes_read
    for name in ("scanned", "refined", "attended", "read"):
        sizes = [getattr(layer, f"bytes_{name}") for layer in report.layers]
        assert sum(sizes) == getattr(report, f"bytes_{name}")
    for layer in report.layers:
        is_sparse = layer.kind == "sparse"
        assert (layer.bytes_scanned > 0) == is_sparse
        assert (layer.bytes_refined > 0) == (is_sparse and "refine" in index)
        assert layer.bytes_attended <= layer.bytes_read_dense
        assert is_sparse or layer.bytes_attended == layer.bytes_read_dense


@given(
    context=st.integers(1, 1500),
    batch=st.integers(1, 3),
    index=INDEXES,
    group_size=st.sampled_from((None, 32, 512)),
    dense_layers=st.integers(0, 5),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    family=st.sampled_from(("llama", "qwen3", "gemma3")),
)
def test_an_estimate_is_what_a_prompt_of_that_length_allocates(
    context: int,
    batch: int,
    index: dict[str, Any],
    group_size: int | None,
    dense_layers: int,
    dtype: torch.dtype,
    family: str,
) -> None:
    config = tiny_config(family)
    options: dict[str, Any] = {
        **index,
        "group_size": group_size,
        "dense_layers": dense_layers,
    }
    estimate = fierpatch.estimate(config, context, batch, dtype=dtype, **options)
    cache = FierCache(config, FierConfig(**options))
    keys = torch.zeros(batch, 2, context, config.head_dim, dtype=dtype)
    for number, store in cache.stores.items():
        cache.update(keys, keys, number)
        layer = estimate.layers[number]
        assert layer.tokens == context
        assert layer.kv_bytes == nbytes(store.keys, store.values)
        assert layer.index_bytes == index_nbytes(cache, number)


@settings(max_examples=20)
@given(
    context=st.integers(9, 1500),
    batch=st.integers(1, 2),
    per_query_head=st.booleans(),
    hot_tokens=st.sampled_from((None, 64, 1000, 40_000)),
    dense_layers=st.integers(0, 3),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    family=st.sampled_from(("llama", "qwen3", "gemma3")),
)
def test_an_estimate_of_what_is_offloaded_is_what_a_prompt_of_that_length_takes(
    context: int,
    batch: int,
    per_query_head: bool,
    hot_tokens: int | None,
    dense_layers: int,
    dtype: torch.dtype,
    family: str,
) -> None:
    config = tiny_config(family)
    options: dict[str, Any] = {
        "budget": 64,
        "offload": True,
        "per_query_head": per_query_head,
        "hot_tokens": hot_tokens,
        "dense_layers": dense_layers,
    }
    estimate = fierpatch.estimate(config, context, batch, dtype=dtype, **options)
    cache = FierCache(config, FierConfig(**options))
    keys = torch.zeros(batch, 2, context, config.head_dim, dtype=dtype)
    query = torch.zeros(batch, 4, context, config.head_dim, dtype=dtype)
    for number, store in cache.stores.items():
        cache.update(keys, keys, number)
        if not store.is_dense:
            store.index_prompt(query)
        layer = estimate.layers[number]
        held = nbytes(store.keys, store.values)
        assert layer.kv_bytes == held
        assert layer.index_bytes == index_nbytes(cache, number)
        assert layer.host_bytes == (0 if store.is_dense else held)
        assert layer.hot_bytes == (0 if store.hot is None else nbytes(*store.hot.tensors))
        assert (store.hot is None) == store.is_dense
        assert layer.hit_rate is layer.prefetch_accuracy is None


@pytest.mark.parametrize("options", [{}, {"offload": True, "prefetch": True}], ids=str)
def test_an_estimate_is_the_report_of_the_run(options: dict[str, Any]) -> None:
    model = tiny_model("qwen3")
    with fierpatch.apply(model, budget=64, **options) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(700, 2), past_key_values=cache)
        run = handle.report().layers
    estimate = fierpatch.estimate(model, 700, 2, settings=handle.config)
    # Which backend runs is not known before there are tensors.
    assert [replace(layer, backend="") for layer in run] == estimate.layers


def test_an_estimate_takes_the_dtype_of_the_model_or_its_configuration() -> None:
    config = tiny_config("llama")
    size = fierpatch.estimate(config, 100, dtype="float32").kv_bytes
    assert fierpatch.estimate(config, 100).kv_bytes == size // 2  # bfloat16 where none is stated
    config.dtype = torch.float64
    assert fierpatch.estimate(config, 100).kv_bytes == 2 * size
    assert fierpatch.estimate(tiny_model("llama"), 100).kv_bytes == size


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "context=0"),
        ((100, 0), {}, "batch=0"),
        ((100.0,), {}, "context=100.0"),
        ((100,), {"dtype": "float33"}, "float33"),
        ((100,), {"bugdet": 3}, "did you mean 'budget'"),
        ((100,), {"budget": 3}, "sinks"),
    ],
)
def test_a_bad_estimate_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fierpatch.estimate(tiny_config("llama"), *arguments, **options)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        # 2 layers x 2 heads x 1,000 tokens x 4.25 bytes; 64 rows there and 1,000 in two dense
        # layers; 256 candidates by 11 bytes or by keys of 32.
        ({}, " (16.6 scanned, 266.0 attended)"),
        ({"refine": 4}, " (16.6 scanned, 11.0 refined, 266.0 attended)"),
        (
            {"refine": 4, "refine_bits": "exact"},
            " (16.6 scanned, 32.0 refined, 266.0 attended)",
        ),
        ({"dense_layers": 4}, ""),
    ],
    ids=["one bit", "codes", "keys", "dense"],
)
def test_a_table_says_what_is_scanned_refined_and_attended(
    options: dict[str, Any], parts: str
) -> None:
    report = fierpatch.estimate(tiny_config("llama"), 1000, budget=64, **options)
    total = str(report).splitlines()[-1]
    size = f"{report.bytes_read / 1024:.1f} KiB"
    share = f"{report.bytes_read / (4 * 2 * 1000 * 64):.1%}"
    assert total.startswith(f"total: reads {size} a step{parts}, {share} of dense; holds ")


def test_printed_layers_of_a_kind_share_a_line() -> None:
    text = str(fierpatch.estimate(tiny_config("llama"), 100_000, 4, dtype="bfloat16"))
    lines = text.splitlines()
    assert lines[0] == "llama: 100000 tokens, batch 4, bfloat16"
    assert [line.split()[:2] for line in lines[2:4]] == [["0-1", "dense"], ["2-3", "sparse"]]
    assert "1024" in lines[3]
    assert lines[-1].startswith("total: reads")
    assert "MiB" in lines[-1]
