"""With budget for every token a patched model generates what the unpatched one does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, StaticCache

import fierpatch
from fierpatch import FierCache, FierConfig
from hf.agreement import (
    FULL_BUDGET,
    RECORD,
    Run,
    assert_agrees,
    assert_as_close,
    in_float64,
)
from hf.models import FAMILIES, FAMILIES_AND_BASES, left_padded, prompt, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)
every_base = pytest.mark.parametrize(("family", "base"), FAMILIES_AND_BASES)


def generate(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
    """`generate` with its scores, from the same random state each time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return model.generate(*args, **RECORD, **options)


@every_base
def test_greedy_tokens_agree_while_the_cache_outgrows_its_first_bucket(
    family: str, base: str
) -> None:
    assert_agrees(
        lambda: tiny_model(family, base),
        lambda model: generate(model, prompt(490), max_new_tokens=40),
    )


@every_base
def test_left_padded_rows_agree(family: str, base: str) -> None:
    """Rows of unequal length, one of them short enough to be mostly padding."""
    inputs = left_padded(60, (0, 7, 55))
    assert_agrees(
        lambda: tiny_model(family, base), lambda model: generate(model, **inputs, max_new_tokens=12)
    )


def chunked(model: PreTrainedModel, size: int) -> Any:
    return generate(model, **left_padded(154, (0, 40)), max_new_tokens=8, prefill_chunk_size=size)


def beams(model: PreTrainedModel) -> Any:
    inputs = left_padded(70, (0, 11))
    return generate(model, **inputs, max_new_tokens=10, num_beams=3, num_return_sequences=2)


def beam_sample(model: PreTrainedModel) -> Any:
    return generate(model, prompt(70), max_new_tokens=10, num_beams=3, do_sample=True)


def sample(model: PreTrainedModel) -> Any:
    inputs = left_padded(70, (5, 0))
    return generate(model, **inputs, max_new_tokens=10, do_sample=True, num_return_sequences=3)


def prompt_lookup(model: PreTrainedModel, num_tokens: int) -> Any:
    """The prompt repeats itself, so that some candidates are accepted and others are not."""
    repeated = prompt(18).repeat(1, 5)
    return generate(model, repeated, max_new_tokens=24, prompt_lookup_num_tokens=num_tokens)


def static(model: PreTrainedModel) -> Any:
    inputs = left_padded(70, (0, 11))
    return generate(model, **inputs, max_new_tokens=12, cache_implementation="static")


def static_beams(model: PreTrainedModel) -> Any:
    options = {"cache_implementation": "static", "num_beams": 3}
    return generate(model, prompt(60), max_new_tokens=8, **options)


def static_chunked(model: PreTrainedModel) -> Any:
    options = {"cache_implementation": "static", "prefill_chunk_size": 32}
    return generate(model, prompt(70), max_new_tokens=8, **options)


def uncached(model: PreTrainedModel) -> Any:
    return generate(model, prompt(40), max_new_tokens=6, use_cache=False)


def embedded(model: PreTrainedModel) -> Any:
    embeddings = model.get_input_embeddings()(prompt(70, 2))
    return generate(model, inputs_embeds=embeddings, max_new_tokens=10)


MODES: dict[str, Run] = {
    "prefill in chunks": functools.partial(chunked, size=64),
    "prefill in chunks, the last a short one": functools.partial(chunked, size=50),
    "prefill in chunks as short as a step": functools.partial(chunked, size=7),
    "beam search": beams,
    "beam sampling": beam_sample,
    "several samples": sample,
    "prompt lookup": functools.partial(prompt_lookup, num_tokens=5),
    "prompt lookup of more tokens than a step": functools.partial(prompt_lookup, num_tokens=12),
    "static cache": static,
    "static cache, beam search": static_beams,
    "static cache, prefill in chunks": static_chunked,
    "no cache": uncached,
    "embeddings for a prompt": embedded,
}


@pytest.mark.parametrize("mode", MODES)
@every_family
def test_every_mode_of_generate_agrees(family: str, mode: str) -> None:
    with torch._dynamo.config.patch(recompile_limit=8):  # which prefill in chunks raises for good
        assert_agrees(lambda: tiny_model(family), MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_generate_runs_in_inference_mode(mode: str) -> None:
    model = tiny_model("llama")
    with torch._dynamo.config.patch(recompile_limit=8), fierpatch.apply(model, budget=24):
        plain = MODES[mode](model)
        with torch.inference_mode():
            assert torch.equal(MODES[mode](model).sequences, plain.sequences)


@pytest.mark.parametrize("max_query_length", [1, 5, 6, 16])
def test_queries_of_any_length_may_be_steps(max_query_length: int) -> None:
    """Prompt lookup verifies six tokens at once: by retrieval, or as a prompt in between."""
    assert_agrees(
        lambda: tiny_model("gemma3"),
        MODES["prompt lookup"],
        max_query_length=max_query_length,
    )


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
@every_family
def test_a_prompt_as_short_as_a_step_agrees(family: str, length: int) -> None:
    inputs = left_padded(length, (0, length // 2))
    assert_agrees(
        lambda: tiny_model(family), lambda model: generate(model, **inputs, max_new_tokens=10)
    )


@pytest.mark.parametrize("both_patched", [False, True])
@every_family
def test_assisted_decoding_agrees(family: str, both_patched: bool) -> None:
    """The assistant is almost the model itself where that is a Llama, so some candidates are right.

    transformers fails where an assistant's sliding layers are past their window.
    """

    def run(model: PreTrainedModel) -> Any:
        assistant = tiny_model("llama")
        with torch.no_grad():
            weight = assistant.get_input_embeddings().weight
            weight += 0.02 * torch.linspace(-1, 1, weight.numel()).view_as(weight)
        if both_patched:
            fierpatch.apply(assistant, budget=FULL_BUDGET)
        return generate(model, prompt(70), max_new_tokens=20, assistant_model=assistant)

    assert_agrees(lambda: tiny_model(family), run)


def test_assistance_by_its_own_first_layers_agrees() -> None:
    assert_agrees(
        lambda: tiny_model("llama"),
        lambda model: generate(model, prompt(70), max_new_tokens=12, assistant_early_exit=3),
    )


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_speculation_over_a_static_cache_agrees(base: str) -> None:
    """Which transformers refuses for caches of its own (transformers#32946)."""

    def run(model: PreTrainedModel) -> Any:
        return generate(
            model, prompt(18).repeat(1, 5), max_new_tokens=24, prompt_lookup_num_tokens=5
        )

    assert_agrees(lambda: tiny_model("llama", base), run, compile=True)


def candidates_in_parallel(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """A custom decoding loop that widens and narrows the batch, as contrastive search does."""
    cache, mask = kwargs["past_key_values"], kwargs["attention_mask"]
    step = functools.partial(model, past_key_values=cache, logits_to_keep=1)
    logits = [step(input_ids=input_ids, attention_mask=mask).logits[:, -1].float()]
    sequences = input_ids
    for _ in range(6):
        candidates = logits[-1].topk(3).indices  # [B, 3]
        cache.batch_repeat_interleave(3)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = (
            step(input_ids=candidates.view(-1, 1), attention_mask=mask.repeat_interleave(3, 0))
            .logits[:, -1]
            .float()
        )
        best = output.amax(-1).view(-1, 3).argmax(-1)
        rows = torch.arange(len(best)) * 3 + best
        cache.batch_select_indices(rows)
        logits.append(output[rows])
        sequences = torch.cat((sequences, candidates.gather(1, best[:, None])), 1)
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences, logits=(*logits,), scores=(*logits,))


@every_family
def test_a_decoding_loop_that_widens_and_narrows_the_batch_agrees(family: str) -> None:
    inputs = left_padded(70, (0, 11))
    assert_agrees(
        lambda: tiny_model(family),
        lambda model: model.generate(
            **inputs, max_new_tokens=6, custom_generate=candidates_in_parallel
        ),
    )


@pytest.mark.parametrize(("family", "base"), [("gemma3", "sdpa"), ("gemma2", "eager")])
@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("dense_layers", [0, 2])
@pytest.mark.parametrize(("index", "bits"), [("rotated", 1), ("rotated", 2), ("fier", 1)])
def test_every_setting_agrees(
    index: str, bits: int, dense_layers: int, per_query_head: bool, family: str, base: str
) -> None:
    inputs = left_padded(140, (0, 33))
    assert_agrees(
        lambda: tiny_model(family, base),
        lambda model: generate(model, **inputs, max_new_tokens=6),
        index=index,
        bits=bits,
        dense_layers=dense_layers,
        per_query_head=per_query_head,
    )


@pytest.mark.parametrize(
    "settings", [{"refine_bits": 4}, {"refine_bits": "exact", "bits": 2}], ids=str
)
@pytest.mark.parametrize(("family", "base"), [("llama", "sdpa"), ("gpt_oss", "eager")])
def test_every_refinement_agrees(settings: dict[str, Any], family: str, base: str) -> None:
    inputs = left_padded(140, (0, 33))
    assert_agrees(
        lambda: tiny_model(family, base),
        lambda model: generate(model, **inputs, max_new_tokens=6),
        refine=2,
        **settings,
    )


@pytest.mark.parametrize("group_size", [32, 64, 256, 512])
@pytest.mark.parametrize("index", ["rotated", "fier"])
def test_every_group_size_agrees(index: str, group_size: int) -> None:
    assert_agrees(
        lambda: tiny_model("llama"),
        lambda model: generate(model, prompt(500), max_new_tokens=30),
        index=index,
        group_size=group_size,
        dense_layers=0,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "base"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_logits_in_half_precision_are_as_close_as_the_unpatched_ones(
    family: str, base: str, dtype: torch.dtype
) -> None:
    tokens = prompt(90, 2)

    def run(model: PreTrainedModel, cache: FierCache | None = None) -> torch.Tensor:
        with torch.no_grad():
            output = model(tokens[:, :70], past_key_values=cache, use_cache=True)
            logits = [output.logits[:, -1]]
            for position in range(70, 90):
                step = tokens[:, position : position + 1]
                output = model(step, past_key_values=output.past_key_values)
                logits.append(output.logits[:, -1])
        return torch.stack(logits)

    model = tiny_model(family, base).to(dtype)
    stock = run(model)
    with in_float64(tiny_model(family, base).to(dtype)) as exact_model:
        exact = run(exact_model)
    with fierpatch.apply(model, budget=FULL_BUDGET, dense_layers=0) as handle:
        patched = run(model, handle.new_cache())
    assert_as_close(patched, stock, exact)


def converse(
    make_cache: Callable[[PreTrainedModel], Any],
    first_turn: Any = torch.no_grad,
    second_turn: Any = torch.no_grad,
) -> Run:
    """Three turns over one cache; the second question is as short as a step."""

    def run(model: PreTrainedModel) -> Any:
        cache = make_cache(model)
        cache = {} if cache is None else {"past_key_values": cache}
        with first_turn():
            output = generate(model, prompt(60, 2), max_new_tokens=6, **cache)
        for turn, length in enumerate((4, 90)):
            cache = {"past_key_values": output.past_key_values}
            with second_turn():
                question = prompt(length, 2, seed=turn + 1)
                tokens = torch.cat((output.sequences, question), 1)
                output = generate(model, tokens, max_new_tokens=6, **cache)
        return output

    return run


def default_cache(model: PreTrainedModel) -> None:
    return None


def static_cache(model: PreTrainedModel) -> Any:
    """A static cache for 200 tokens, of ours where the model is patched."""
    handle = model.__dict__.get("_fierpatch_handle")
    if handle is None:
        return StaticCache(model.config, 512)
    return FierCache(model.config, handle.config.replace(compile=True), max_cache_len=200)


CACHES = pytest.mark.parametrize("make_cache", [default_cache, static_cache])


@CACHES
@every_family
def test_several_turns_over_one_cache_agree(family: str, make_cache: Any) -> None:
    assert_agrees(lambda: tiny_model(family), converse(make_cache))


@CACHES
@pytest.mark.parametrize(
    "turns", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_a_cache_serves_in_and_out_of_inference_mode(make_cache: Any, turns: Any) -> None:
    """A later turn may run outside the inference mode of the first one, and the other way round."""
    model = tiny_model("llama")
    with fierpatch.apply(model, budget=FULL_BUDGET):
        mixed = converse(make_cache, *turns)(model)
        plain = converse(make_cache)(model)
    assert torch.equal(mixed.sequences, plain.sequences)


def test_a_cache_without_its_patch_attends_densely_and_still_serves() -> None:
    model = tiny_model("llama")
    stock = converse(default_cache)(model)
    with fierpatch.apply(model, budget=21, dense_layers=0) as handle, handle.disabled():
        unpatched = converse(lambda model: handle.new_cache())(model)
    assert torch.equal(unpatched.sequences, stock.sequences)


@settings(max_examples=15)
@given(
    length=st.integers(1, 700),
    pads=st.lists(st.floats(0, 0.95), min_size=1, max_size=3),
    num_new=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    family=st.sampled_from(FAMILIES),
)
@example(length=512, pads=[0.0, 0.5], num_new=3, seed=0, family="llama")
@example(length=511, pads=[0.0], num_new=3, seed=1, family="gpt_oss")
def test_any_batch_of_prompts_agrees(
    length: int, pads: list[float], num_new: int, seed: int, family: str
) -> None:
    inputs = left_padded(length, tuple(int(share * length) for share in pads), seed)
    assert_agrees(
        lambda: tiny_model(family),
        lambda model: generate(model, **inputs, max_new_tokens=num_new),
        dense_layers=0,
    )


@every_family
def test_a_small_budget_attends_to_that_many_tokens_of_each_sparse_layer(family: str) -> None:
    """Retrieval is on: without this, all of the above could pass by attending densely."""
    model = tiny_model(family)
    stock = generate(model, prompt(200), max_new_tokens=5)
    lists: list[tuple[int, ...]] = []

    def observe(layer: Any, query: Any, token_indices: torch.Tensor, *args: Any) -> None:
        assert (token_indices >= 0).all()
        lists.append(tuple(token_indices.shape))

    with fierpatch.apply(model, budget=24) as handle:
        cache = handle.new_cache()
        cache.observe(observe)
        output = generate(model, prompt(200), max_new_tokens=5, past_key_values=cache)
        num_sparse = sum(layer.kind == "sparse" for layer in handle.report(cache).layers)
    num_kv_heads = model.config.num_key_value_heads
    assert num_sparse > 0
    assert lists == [(1, num_kv_heads, 1, 24)] * num_sparse * 4  # the prompt gives one token more
    assert torch.equal(output.logits[0], stock.logits[0])
    assert (output.logits[1] - stock.logits[1]).abs().max() > 1e-2


def test_the_settings_given_at_apply_reach_the_cache_of_generate() -> None:
    model = tiny_model("llama")
    config = FierConfig(budget=30, index="fier", per_query_head=True)
    with fierpatch.apply(model, config):
        output = generate(model, prompt(40), max_new_tokens=2)
    assert isinstance(output.past_key_values, FierCache)
    assert output.past_key_values.settings == config
