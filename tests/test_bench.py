"""The benches measure what they say, at sizes a CPU can wait for."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import fierpatch
from fierpatch import FierConfig
from fierpatch.errors import ConfigError
from fierpatch.patching import current_handle
from fierpatch.reference import gather_attention

pytest.importorskip("bench", reason="the benches are in the checkout alone: python -m pytest")

from bench import (
    attention_mass,
    decode,
    flex,
    flex_prefill,
    generate,
    offload,
    passkey,
    plot,
    prefill_index,
    prefill_quality,
    residency,
    second_copy,
    traces,
    ways,
)
from bench import prefill as bench_prefill
from bench.hot_set import EMPTY, HotSet
from bench.options import BYTES, add_trial, trials
from bench.peers import dense
from bench.prompts import prefill
from bench.rows import read, save, table
from bench.synthetic import fill, random_llama
from bench.timing import copy_bandwidth, interleaved, queued, replays, summary

SETTINGS: dict[str, Any] = {"budget": 40, "dense_layers": 1}
CASE = decode.Case(2, 600, num_heads=4, num_kv_heads=2, head_dim=32, device="cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return random_llama("llama-tiny", "cpu", 2)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def check_times(row: dict[str, Any], unit: str) -> None:
    assert "reason" not in row, row
    assert 0 < row[f"{unit}_p20"] <= row[unit] <= row[f"{unit}_p80"]
    assert math.isfinite(row[unit])


def test_a_timer_calls_the_function_before_it_counts_and_returns_as_many_samples_as_asked() -> None:
    calls: list[str] = []
    samples = replays(
        lambda: calls.append("timed"), device="cpu", count=5, before=lambda: calls.append("before")
    )
    assert len(samples) == 5
    assert calls == ["before", "timed"] * (len(calls) // 2)
    assert len(queued(lambda: None, device="cpu", count=4)) == 4
    both = interleaved({"a": lambda: None, "b": lambda: None}, device="cpu", count=3)
    assert {name: len(times) for name, times in both.items()} == {"a": 3, "b": 3}


def test_a_summary_holds_the_median_and_both_percentiles() -> None:
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0], "us") == {"us": 3.0, "us_p20": 2.0, "us_p80": 5.0}


def test_copy_bandwidth_is_positive() -> None:
    assert copy_bandwidth("cpu", nbytes=1 << 16, count=3) > 0


def test_rows_kept_from_an_earlier_run_stay_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    assert read(path) == []
    save("first", "cpu", [{"what": "a", "ms": 1.0}], path)
    kept = read(path)
    save("second", "cpu", [{"what": "b"}], path, kept=kept)
    rows = read(path)
    assert rows[0] == kept[0]
    assert (rows[1]["bench"], rows[1]["what"]) == ("second", "b")
    assert {"device", "torch", "transformers", "commit", "command", "date"} <= set(rows[1])


@pytest.mark.filterwarnings("ignore::UserWarning")  # why torch refuses cuDNN on this device
def test_a_layer_is_measured_against_its_peers_and_a_refused_peer_gives_a_reason() -> None:
    settings = FierConfig(budget=40, compile=True)
    rows = decode.measure(CASE, settings, bandwidth=1e10, repeats=2)
    by_name = {row["what"]: row for row in rows}
    expected = ["SDPA", "torch.topk float32", "torch.gather K, V", "append", "attend", "total"]
    for name in expected:
        check_times(by_name[name], "us")
        assert by_name[name]["ratio"] > 0
        assert by_name[name]["context"] == 600
    # 2 rows x 2 heads x 600 tokens x 32 channels x 4 bytes, K and V, at 10 GB/s
    assert by_name["dense floor"]["us"] == pytest.approx(2 * 2 * 2 * 600 * 32 * 4 / 1e10 * 1e6)
    assert by_name["SDPA cuDNN"]["reason"].startswith("RuntimeError")
    json.dumps(rows)
    assert "total" in table(rows, ["what", "us", "ratio"])


def test_a_layer_that_cannot_be_built_costs_no_peer_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decode, "filled_layer", refuse)
    rows = decode.measure(CASE, FierConfig(budget=40, compile=True), bandwidth=1e10, repeats=1)
    assert rows[-1]["reason"] == "RuntimeError: out of memory"
    check_times(rows[1], "us")


def test_the_dense_peers_compute_the_same() -> None:
    query, keys, values = CASE.random(4, 1), CASE.random(2, 600), CASE.random(2, 600)
    peers = dense(query, keys, values)
    exact = peers["SDPA"]()
    assert isinstance(exact, torch.Tensor)
    torch.testing.assert_close(peers["SDPA FlashAttention"](), exact)


def test_a_filled_layer_has_tokens_beyond_its_prompt_and_room_for_one_more() -> None:
    layer = decode.filled_layer(
        CASE, FierConfig(budget=40, compile=True), CASE.random(2, 600), CASE.random(2, 600)
    )
    assert layer.num_tokens == 600 + decode.EXTRA
    assert int(layer.counters[1]) == layer.num_tokens
    assert layer.capacity > layer.num_tokens


@pytest.mark.parametrize(
    ("ratios", "context"),
    [
        ({2048: 1.5, 4096: 0.5}, 3072),
        ({2048: 0.9, 4096: 0.5}, None),
        ({2048: 3.0, 4096: 1.5}, None),
        ({}, None),
    ],
    ids=["between", "always faster", "never faster", "nothing measured"],
)
def test_the_crossover_is_interpolated_or_said_to_be_outside(
    ratios: dict[int, float], context: int | None
) -> None:
    rows = [{"what": "total", "context": c, "ratio": ratio} for c, ratio in ratios.items()]
    assert decode.crossover(rows)["context"] == context
    assert decode.crossover(rows)["reason"]


@pytest.mark.parametrize("name", [name for name in ways.WAYS if name != "stock-offloaded"])
def test_every_way_to_decode_gives_a_row(name: str, model: Any) -> None:
    plan = ways.Plan(context=64, steps=24, settings=SETTINGS, compiler="eager")
    row = ways.measure(model, name, plan)
    assert row["ms"] > 0, row
    assert (row["what"], row["context"]) == (name, 64)
    assert current_handle(model) is None
    assert "_compiled_call" not in model.__dict__


@pytest.mark.parametrize("is_patched", [False, True], ids=["stock", "patched"])
def test_generate_feeds_one_token_to_a_filled_static_cache(is_patched: bool, model: Any) -> None:
    plan = ways.Plan(context=64, steps=4, settings=SETTINGS, compiler="eager")
    fed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        with fierpatch.apply(model, **SETTINGS, compile=True) as handle:
            if is_patched:
                cache = handle.new_cache(max_cache_len=plan.capacity)
                fill(model, cache, 64)
                ways.seconds_of_generate(model, cache, 3, plan)
        if not is_patched:
            cache = StaticCache(config=model.config, max_cache_len=plan.capacity)
            fill(model, cache, 64)
            ways.seconds_of_generate(model, cache, 3, plan)
    finally:
        hook.remove()
        ways.release(model)
    # The first new token comes of the one id that the cache did not hold.
    assert int(cache.get_seq_length()) == 64 + 3
    assert set(fed) == {1}


def test_a_way_that_fails_leaves_a_reason_and_no_patch(
    monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    def fail(*args: Any) -> list[float]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(ways, "fill", fail)
    row = ways.measure(model, "patched", ways.Plan(64, 2, SETTINGS))
    assert row["reason"] == "OutOfMemoryError: no memory"
    assert current_handle(model) is None


def test_steps_in_turn_have_stages_and_ratios(model: Any) -> None:
    rows = generate.with_ratios(generate.in_turn(model, 96, 2, SETTINGS))
    names = [row["what"] for row in rows]
    assert names[:3] == ["stock", "patched", "stock, 64 tokens"]
    assert "  select x 1" in names
    for row in rows:
        check_times(row, "ms")
        assert row["ratio"] > 0
    assert rows[0]["ratio"] == 1


def test_the_command_saves_after_each_way_and_keeps_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    command = ["--model", "llama-tiny", "--layers", "2", "--steps", "2", "--budget", "40"]
    command += ["--context", "64", "--output", str(path)]
    generate.main([*command, "--only", "stock-dynamic"])
    generate.main([*command, "--keep", "--only", "patched"])
    assert [row["what"] for row in read(path)] == ["stock-dynamic", "patched"]
    assert "saved" in capsys.readouterr().out


def test_a_prefill_is_measured_with_the_index_and_without(model: Any) -> None:
    ids = torch.ones(1, 128, dtype=torch.long)
    stock, patched = prefill_index.measure(model, ids, 2, {"index": "rotated", "dense_layers": 1})
    for row in (stock, patched):
        check_times(row, "ms")
    assert (stock["ratio"], patched["context"]) == (1, 128)


def test_a_curve_leaves_out_stages_and_what_was_not_measured() -> None:
    rows = [
        {"what": "patched", "context": 128, "ms": 2.0},
        {"what": "patched", "context": 64, "ms": 1.0},
        {"what": "  select x 30", "context": 64, "ms": 1.0},
        {"what": "stock", "context": 64, "reason": "refused"},
    ]
    assert plot.curves(rows) == {"patched": [(64, 1.0), (128, 2.0)]}


def test_a_curve_against_the_overlap_is_of_one_context_and_size_of_the_hot_set() -> None:
    rows: list[dict[str, Any]] = [
        {"what": "offloaded", "context": 128, "overlap": 0.5, "ms": 2.0},
        {"what": "offloaded", "context": 128, "overlap": 0.9, "ms": 1.0},
        {"what": "offloaded", "context": 128, "overlap": 0.9, "ms": 1.5, "hot_tokens": 64},
        {"what": "offloaded", "context": 512, "overlap": 0.9, "ms": 4.0},
        {"what": "prefill, resident", "context": 128, "ms": 9.0},
        {"what": "weights", "ms": 9.0},
    ]
    expected = {"offloaded": [(0.5, 2.0), (0.9, 1.0)], "offloaded, 64 hot rows": [(0.9, 1.5)]}
    assert plot.curves(rows, "overlap") == expected
    assert plot.shared(rows, "overlap") == "128 tokens"


def test_a_curve_against_the_context_is_of_one_overlap() -> None:
    """Of that at which most contexts were measured, whatever else was at some of them."""
    ways = ("resident", "offloaded", "offloaded, prefetch")
    rows: list[dict[str, Any]] = [
        {"what": what, "context": 128, "overlap": overlap, "ms": 10 * place - overlap}
        for place, what in enumerate(ways, 1)
        for overlap in (1.0, 0.9, 0.8, 0.5, 0.0)
    ]
    rows += [
        {"what": "offloaded", "context": 64, "overlap": 0.8, "ms": 3.0},
        {"what": "offloaded", "context": 2048, "overlap": 0.8, "ms": 30.0},
    ]
    expected = {
        "resident": [(128, 9.2)],
        "offloaded": [(64, 3.0), (128, 19.2), (2048, 30.0)],
        "offloaded, prefetch": [(128, 29.2)],
    }
    for order in (rows, rows[::-1]):
        assert plot.curves(order) == expected
        assert plot.shared(order, "context") == "overlap 0.8"
        assert plot.shared(order, "overlap") == "128 tokens"
        assert len(plot.curves(order, "overlap")["offloaded"]) == 5
    assert plot.fixed(rows[:-2], "context") == ("overlap", 0.8), "of equals"


def test_a_curve_is_of_one_setting() -> None:
    row = {"context": 128, "overlap": 0.8, "layers": 32, "budget": 1024, "refine": 0, "bits": 1}
    row |= {"index": "rotated", "hot_tokens": None}
    others: list[dict[str, Any]] = [
        {"layers": 4},
        {"budget": 512, "hot_tokens": 2048},
        {"refine": 4},
        {"index": "fier"},
        {"bits": 2},
    ]
    rows = [
        row | other | {"what": what, "ms": 1.0 + number}
        for number, other in enumerate([{}, *others])
        for what in ("resident", "offloaded, prefetch")
    ]
    # Rows from before there was a column are of what is usual.
    rows.append({"what": "resident", "context": 64, "overlap": 0.8, "ms": 0.5})
    expected = {
        "resident": [(64, 0.5), (128, 1.0)],
        "resident, 4 layers": [(128, 2.0)],
        "resident, budget 512": [(128, 3.0)],
        "resident, refine 4": [(128, 4.0)],
        "resident, fier": [(128, 5.0)],
        "resident, 2 bits": [(128, 6.0)],
    }
    found = plot.curves(rows)
    assert {name: x for name, x in found.items() if name.startswith("resident")} == expected
    assert found["offloaded, prefetch, budget 512, 2048 hot rows"] == [(128, 3.0)]
    stock = {"what": "stock-static", "context": 64, "budget": 512, "ms": 1.0}
    assert [*plot.curves([stock])] == ["stock-static"]


@pytest.mark.parametrize("by", plot.AXES)
def test_a_plot_is_saved_beside_its_rows_one_for_each_axis(by: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="nothing else needs it")
    rows = [
        {"what": what, "context": context, "overlap": overlap, "ms": 1.0, "device": "a device"}
        for what in ("resident", "offloaded")
        for context, overlap in ((64, 0.8), (128, 0.8), (128, 0.5))
    ]
    rows.append({**rows[1], "what": "offloaded, prefetch", "hot_tokens": 64})
    path = save("offload", "cpu", rows, tmp_path / "rows.jsonl")
    plot.main(["--input", str(path), "--by", by])
    picture = tmp_path / ("rows.svg" if by == "context" else "rows-overlap.svg")
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("name", offload.WAYS)
def test_steps_of_every_tier_have_rows_by_overlap(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    command = ["--device", "cpu", "--model", "llama-tiny", "--layers", "3", "--only", "steps"]
    command += ["--context", "900", "--budget", "99", "--hot-tokens", "150", "--steps", "3"]
    command += ["--compiler", "eager", "--overlap", "0.9", "0.5", "--output", str(path)]
    offload.main([*command, "--ways", name])
    rows = read(path)
    assert [(row["what"], row["overlap"]) for row in rows] == [(name, 0.9), (name, 0.5)]
    for row in rows:
        check_times(row, "ms")
        assert abs(row["overlap_found"] - row["overlap"]) < 0.1
        assert ("hit" in row) == (name != "resident")
        assert (row["host_mib"] > 0) == (name != "resident")
        assert row["layers"] == 3
    if name != "resident":
        assert rows[0]["hit"] > rows[1]["hit"]
    # Where most of a selection was there before it does not pay.
    assert [bool(row.get("prefetched")) for row in rows] == [False, "prefetch" in name]


def test_prefill_is_measured_on_the_device_and_on_the_host(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    command = ["--device", "cpu", "--model", "llama-tiny", "--layers", "3", "--only", "prefill"]
    offload.main([*command, "--prompt", "200", "--rounds", "1", "--output", str(path)])
    rows = read(path)
    assert [row["what"] for row in rows] == ["prefill, resident", "prefill, offloaded"]
    for row in rows:
        check_times(row, "ms")
        assert row["layers"] == 3
    assert rows[0]["ratio"] == 1


def test_a_kept_row_gives_way_to_one_of_the_same_settings_alone(tmp_path: Path) -> None:
    command = ["--device", "cpu", "--model", "llama-tiny", "--only", "prefill", "--rounds", "1"]
    command += ["--prompt", "200", "--keep", "--output", str(tmp_path / "rows.jsonl")]
    for more in (["--layers", "3"], ["--layers", "2"], ["--layers", "2", "--refine", "2"]) * 2:
        offload.main([*command, *more])
    rows = read(tmp_path / "rows.jsonl")
    found = [(row["layers"], row["refine"]) for row in rows if row["what"] == "prefill, offloaded"]
    assert found == [(3, 0), (2, 0), (2, 2)]


def test_a_row_without_its_layers_is_of_the_whole_model() -> None:
    row: dict[str, Any] = {"what": "offloaded", "context": 131072, "overlap": 0.8, "budget": 1024}
    assert offload.identity(row) == offload.identity(row | {"layers": 32})
    assert offload.identity(row) != offload.identity(row | {"layers": 4})


def test_a_plot_without_rows_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="bench generate"):
        plot.main(["--input", str(tmp_path / "none.jsonl")])


def test_a_hot_set_keeps_what_was_selected_last() -> None:
    """Against a list a head, whose front leaves first."""
    generator = torch.Generator().manual_seed(0)
    hot = HotSet(3, 9, 40)
    lists: list[list[int]] = [[], [], []]
    for step in range(60):
        # One token a step: no two share a stamp.
        chosen = torch.randint(20, (3, 1), generator=generator) + step % 20
        put = hot.put(chosen, step)
        for head, held in enumerate(lists):
            token = int(chosen[head])
            assert bool(put.is_hit[head]) is (token in held)
            assert bool(put.is_fetched[head]) is (token not in held)
            held[:] = [*[other for other in held if other != token][-8:], token]
        everything = torch.arange(40).expand(3, -1)
        assert [row.nonzero().flatten().tolist() for row in hot.holds(everything)] == [
            sorted(held) for held in lists
        ]


def test_what_is_fetched_ahead_takes_no_row_of_a_higher_stamp_and_is_told_from_a_hit() -> None:
    hot = HotSet(1, 4, 20)
    hot.put(torch.tensor([[1, 2, 3]]), 2)
    ahead = hot.put(torch.tensor([[3, 7, 8]]), 1, ahead_at=5)
    assert ahead.is_fetched.tolist() == [[False, True, False]]
    assert hot.holds(torch.tensor([[1, 2, 3, 7, 8]])).tolist() == [[True, True, True, True, False]]
    wanted = hot.put(torch.tensor([[3, 7]]), 4)
    assert wanted.ahead_at.tolist() == [[EMPTY, 5]]
    assert hot.put(torch.tensor([[7]]), 6).ahead_at.tolist() == [[EMPTY]]
    hot.put(torch.tensor([[9]]), 5, ahead_at=6)
    # Three of stamps below, and the one that nobody has wanted among them.
    assert hot.put(torch.tensor([[10, 11, 12]]), 8).num_wasted == 1


@pytest.fixture(scope="module")
def trace() -> traces.Trace:
    model = random_llama("llama-tiny", "cpu")
    ids = torch.randint(256, (1, 210), generator=torch.Generator().manual_seed(0))
    prompt = prefill(model, ids[:, :150])
    settings = FierConfig(budget=32, dense_layers=1)
    return traces.record(model, prompt, ids[:, 150:], settings, is_greedy=False)


def test_a_trace_holds_selections_and_what_ranks_behind_them(trace: traces.Trace) -> None:
    num_steps, num_heads, budget = trace.selected.shape
    assert (num_steps, num_heads, budget) == (60, 2 * 2, 32)
    newest = torch.arange(150, 210)
    assert torch.equal(trace.selected[..., -1], newest[:, None].expand(-1, num_heads))
    both = torch.cat((trace.selected, trace.runners_up), 2).sort(2).values
    assert (both[..., 1:] > both[..., :-1]).all()
    for estimated in trace.estimated.values():
        assert estimated.shape == trace.selected.shape


def test_a_query_estimated_from_a_layers_own_input_is_its_query() -> None:
    model = random_llama("llama-tiny", "cpu", 1)
    layer, seen = model.model.layers[0], {}

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen["estimate"] = traces.estimated_query(layer, args[0], kwargs["position_embeddings"])

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    with fierpatch.apply(model, budget=32, dense_layers=0) as handle:
        cache = handle.new_cache()
        model(torch.ones(1, 64, dtype=torch.long), past_key_values=cache)
        cache.observe(lambda layer, query, *rest: seen.update(query=query))
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    hook.remove()
    torch.testing.assert_close(seen["estimate"], seen["query"], rtol=0, atol=0)


def test_hits_of_a_hot_set_as_large_as_the_budget_are_the_tokens_that_stay(
    trace: traces.Trace,
) -> None:
    before, after = trace.selected[residency.WARM_UP - 1 : -1], trace.selected[residency.WARM_UP :]
    stay = (after[..., :-1, None] == before[..., None, :]).any(3).float().mean().item()
    for has_foresight in (False, True):
        row = residency.simulate(trace, 32, has_foresight=has_foresight)
        assert row["hit"] == pytest.approx(stay)
        assert row["misses"] == pytest.approx((1 - stay) * 31)


def test_residency_rows_are_ordered_as_their_meaning_says(trace: traces.Trace) -> None:
    rows = residency.measure(trace, [1, 2, 3], [0.5], [0])
    hits = {(row["what"], row["rows"]): row["hit"] for row in rows}
    assert hits["alone", 1] < hits["alone", 2] <= hits["foresight", 2] <= hits["foresight", 3]
    fetched = next(row for row in rows if row["what"] == "runners-up fetched")
    assert 0 < fetched["used_next"] <= 1
    assert 0 < fetched["fetched_ahead"] <= 16
    for name in traces.ESTIMATES:
        assert hits[f"{name}, beside", 0] <= hits[f"{name}, beside", 2]
        assert hits["alone", 2] <= hits[f"{name}, beside", 2]
        assert hits[name, 2] <= hits[name, 3]
    json.dumps(rows)


def test_the_prefill_of_one_layer_is_timed_beside_its_peer_and_says_what_it_holds() -> None:
    case = flex_prefill.Case(2500, 4, 2, 32, "cpu")
    peer, *rows = flex_prefill.measure(case, [0.5, 0.9], ["index", "keys"], "reference", 2)
    assert peer["what"] == "SDPA"
    assert len(rows) == 4
    for row in (peer, *rows):
        check_times(row, "ms")
    for row in rows:
        # The least tokens are half of the prompt, so that the mass asked for is not the mass held.
        assert 0.3 < row["density"] < 1
        assert row["mass"] > 0.5
        assert 0 < row["choose_share"] <= 1


def test_the_prefill_of_a_model_is_timed_by_every_way(model: Any) -> None:
    ids = torch.randint(256, (1, 600), generator=torch.Generator().manual_seed(0))
    ways = ["stock", "dense", "sparse", "sparse, offload"]
    settings = FierConfig(budget=64, dense_layers=1, prefill_mass=0.5)
    rows = bench_prefill.measure(model, ids, 2, settings, ways)
    assert [row["what"] for row in rows] == ways
    for row in rows:
        check_times(row, "ms")
    assert "density" not in rows[1]
    assert 0 < rows[2]["density"] < 1
    assert rows[2]["density"] == rows[3]["density"]
    assert current_handle(model) is None


def test_density_and_mass_of_everything_are_1(model: Any) -> None:
    ids = torch.randint(256, (1, 300), generator=torch.Generator().manual_seed(0))
    texts = [(ids, slice(1, 300))]
    base: list[torch.Tensor] = []
    settings = FierConfig(budget=64, dense_layers=1)
    dense_row = prefill_quality.measure(model, texts, settings, base)
    assert dense_row["kl"] == 0
    everything = settings.replace(prefill="sparse", prefill_mass=1.0)
    row = prefill_quality.measure(model, texts, everything, base)
    assert row["density"] == 1
    assert row["mass"] == pytest.approx(1, abs=1e-5)
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    few = prefill_quality.measure(model, texts, everything.replace(prefill_mass=0.3), base)
    assert few["density"] < 1
    assert few["mass"] < 1
    assert few["kl"] > 0


def test_flex_attention_is_measured_part_by_part_for_both_kinds_of_selection() -> None:
    rows = flex.measure(CASE, 128, [16], repeats=1, with_dense=False)
    by_name = {(row["what"], row.get("selection")): row for row in rows}
    check_times(by_name["scores and select", None], "us")
    for selection in ("random", "runs"):
        for what in ("mask: update", "mask: attention", "mask: both"):
            row = by_name[what, selection]
            check_times(row, "us")
            # 128 tokens in 8 blocks where they lie side by side, and in up to 38 of 38 elsewhere.
            assert (row["blocks"] == 8) == (selection == "runs")
        for what in ("compact: gather", "compact: attention", "compact: both"):
            check_times(by_name[what, selection], "us")
    json.dumps(rows)


def test_what_flex_attention_is_measured_at_is_the_attention_over_its_selection() -> None:
    query, keys, values = CASE.random(4, 1), CASE.random(2, 600), CASE.random(2, 600)
    lists = flex.selected(CASE, 128, in_runs=True)
    assert lists.shape == (2, 2, 1, 128)
    expected = gather_attention(query, keys, values, lists, scale=32**-0.5)
    masked, _ = flex.by_mask(query, keys, values, lists, 16)
    gathered = flex.by_rows(query, keys, values, lists, 16)
    for function in (masked["mask: attention"], gathered["compact: attention"]):
        output, _ = function()
        torch.testing.assert_close(output.view_as(expected), expected)
    every = flex.selected(CASE, 600, in_runs=False)
    dense_expected = gather_attention(query, keys, values, every, scale=32**-0.5)
    output = flex.dense_flex(query, keys, values)()
    torch.testing.assert_close(output.view_as(dense_expected), dense_expected)


class Bytes:
    """A tokenizer whose tokens are bytes, without a template."""

    chat_template = bos_token_id = None

    def encode(self, text: str, **options: bool) -> list[int]:
        return list(text.encode())

    def decode(self, ids: torch.Tensor) -> str:
        return bytes(ids.tolist()).decode(errors="replace")


def trials_of(*command: str) -> list[tuple[str, FierConfig]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=int, nargs="+", default=[64])
    add_trial(parser)
    return trials(parser.parse_args(command))


def test_a_trial_is_of_every_combination_and_else_of_the_defaults() -> None:
    assert trials_of("--only", "fier") == [("fier", FierConfig(budget=64, index="fier"))]
    tried = trials_of("--only", "keys", "fier", "--sinks", "0", "1", "--recent", "3", "5")
    names, settings = zip(*tried, strict=True)
    assert names == ("keys",) * 4 + ("fier",) * 4
    pairs = [(0, 3), (0, 5), (1, 3), (1, 5)]
    assert [(chosen.sinks, chosen.recent) for chosen in settings] == pairs * 2


def test_a_trial_whose_window_exceeds_a_budget_is_an_error_before_anything_is_measured() -> None:
    with pytest.raises(ConfigError, match="sinks"):
        trials_of("--recent", "64", "--budget", "128", "64")


@pytest.mark.parametrize(("bench", "figure"), [(second_copy, "kl"), (passkey, "found")])
def test_a_bench_of_quality_has_a_row_for_dense_and_one_for_every_trial(
    bench: Any, figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    monkeypatch.setattr(bench, "load", lambda *args, **options: (model, Bytes()))
    path = tmp_path / "rows.jsonl"
    command = ["--model", "none", "--tokens", "300", "--budget", "40", "--sinks", "0", "4"]
    command += ["--recent", "1", "--dense-layers", "1", "--only", "fier", "--output", str(path)]
    bench.main(command)
    rows = read(path)
    assert [(row["index"], row.get("sinks"), row.get("recent")) for row in rows] == [
        ("dense", None, None),
        ("fier", 0, 1),
        ("fier", 4, 1),
    ]
    assert all(row[figure] >= 0 for row in rows)


def test_trials_of_the_second_copy_say_what_they_scan_refine_and_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    monkeypatch.setattr(second_copy, "load", lambda *args, **options: (model, Bytes()))
    path = tmp_path / "rows.jsonl"
    command = ["--model", "none", "--tokens", "100", "--gap", "100", "--budget", "40", "--only"]
    command += ["rotated 1 bit", "fier", "1 bit, refined by 4", "keys", "--output", str(path)]
    second_copy.main([*command, "--step", "8"])
    head_dim = model.config.head_dim
    bits, keys, scale = head_dim / 8, 2 * head_dim, 2
    one_bit = bits + scale + keys / 128
    assert [[row.get(name) for name in BYTES] for row in read(path)] == [
        [None, None, None],
        [one_bit, 0, one_bit],
        [bits + 2 * keys / 32, 0, bits + 2 * keys / 32],
        [one_bit, 4 * bits + 1 + scale, one_bit + 3 * bits + 1],
        [one_bit, keys, one_bit],
    ]


def test_the_mass_of_every_index_has_the_bytes_it_scans_refines_and_holds_beside_it() -> None:
    query, key = torch.randn(1, 4, 1100, 64), torch.randn(1, 2, 1100, 64)
    sizes = {}
    for name, masses, columns in attention_mass.layer_masses(query, key):
        assert masses.shape == (len(attention_mass.BUDGETS),)
        assert list(columns) == BYTES
        sizes[name] = tuple(columns.values())
    assert sizes["exact"] == (128, 0, 128)
    assert sizes["rotated 1 bit"] == (11, 0, 11)
    assert sizes["rotated 2 bits"] == (19, 0, 19)
    assert sizes["fier g32"] == (16, 0, 16)
    assert sizes["quest p16"] == (16, 0, 16)
    assert sizes["1 bit, refined by 4 bits"] == (11, 35, 36)
    assert sizes["1 bit, refined by keys"] == (11, 128, 11)
