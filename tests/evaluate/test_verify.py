"""verify measures what a patch changes, and changes nothing itself."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fierpatch
from fierpatch import FierConfig
from fierpatch.errors import ConfigError, ModelError, PromptError, TokenizerError
from fierpatch.hf.decoding import next_logits
from hf.fingerprint import fingerprint, registered
from hf.models import FAMILIES, MAX_POSITIONS, tiny_model
from hf.tokens import NUM_TOKENS, byte_tokenizer

FULL = {"budget": 4096, "dense_layers": 0}
SMALL = {"budget": 48, "dense_layers": 0}

every_family = pytest.mark.parametrize("family", FAMILIES)


def a_text(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz .", k=length))


def model_of(family: str = "llama", **changes: Any) -> PreTrainedModel:
    return tiny_model(family, vocab_size=NUM_TOKENS, **changes)


verify = functools.partial(fierpatch.verify, max_new_tokens=6)


@every_family
def test_budget_for_every_token_is_dense(family: str) -> None:
    result = verify(model_of(family), byte_tokenizer(), a_text(150), **FULL)
    assert result.token_agreement == 1
    # Each logit may be off by a few roundings of fp32, and KL is quadratic in them.
    assert result.max_kl < torch.finfo(torch.float32).eps
    assert result.attention_mass
    for mass in result.attention_mass.values():
        assert mass == pytest.approx(1, abs=1e-5)
    assert result.tokens == 150
    assert result.tokens_attended == 156


@every_family
def test_a_small_budget_holds_less_of_the_weight(family: str) -> None:
    """With sliding layers too, whose window is passed while the dense model decodes."""
    result = verify(model_of(family), byte_tokenizer(), a_text(150), **SMALL)
    assert 0 < min(result.attention_mass.values()) < max(result.attention_mass.values()) < 1
    assert result.max_kl >= result.kl > 1e-4
    assert result.tokens_attended == result.budget == 48
    assert len(result.step_kl) == len(result.step_agreement) == 6


def test_the_steps_average_to_the_whole() -> None:
    result = verify(model_of(), byte_tokenizer(), a_text(150), **SMALL)
    assert result.kl == pytest.approx(sum(result.step_kl) / 6)
    assert result.token_agreement == pytest.approx(sum(result.step_agreement) / 6)


def test_only_sparse_layers_are_measured() -> None:
    result = verify(model_of(), byte_tokenizer(), a_text(150), budget=48, dense_layers=2)
    assert list(result.attention_mass) == [2, 3]


def test_without_a_sparse_layer_all_is_dense() -> None:
    result = verify(model_of(), byte_tokenizer(), a_text(150), budget=48, dense_layers=4)
    assert (result.attention_mass, result.tokens_attended) == ({}, 0)
    assert result.token_agreement == 1
    assert "every step was dense" in str(result)


@pytest.mark.parametrize("length", [1, 3, 8, 9])
def test_a_prompt_shorter_than_the_longest_query_has_a_dense_reference(length: int) -> None:
    """Else what it is compared with would have been read through retrieval."""
    options = {"budget": 2, "sinks": 0, "recent": 1, "dense_layers": 0}
    model, text = model_of(), a_text(length)
    result = verify(model, byte_tokenizer(), text, **options)
    full = verify(model, byte_tokenizer(), text, **FULL)
    assert full.token_agreement == 1
    assert result.kl > full.kl


@every_family
def test_padded_rows_count_as_each_row_alone(family: str) -> None:
    model, tokenizer = model_of(family), byte_tokenizer(pad_token="<pad>")
    texts = [a_text(length, seed=length) for length in (130, 77, 5)]
    together = verify(model, tokenizer, texts, **FULL)
    alone = [verify(model, tokenizer, text, **FULL) for text in texts]
    assert together.token_agreement == 1 == min(result.token_agreement for result in alone)
    assert together.max_kl < torch.finfo(torch.float32).eps
    assert together.attention_mass == pytest.approx(alone[0].attention_mass, abs=1e-5)
    assert together.tokens == 130


def test_padding_takes_no_share_at_a_small_budget() -> None:
    model, tokenizer = model_of(), byte_tokenizer(pad_token="<pad>")
    texts = [a_text(130), a_text(70, seed=1)]
    # All budget is spent on sinks and recents, which no row's index has a say in.
    options = {**SMALL, "recent": 47, "sinks": 1}
    together = verify(model, tokenizer, texts, **options)
    alone = [verify(model, tokenizer, text, **options) for text in texts]
    for number, mass in together.attention_mass.items():
        mean = sum(result.attention_mass[number] for result in alone) / 2
        assert mass == pytest.approx(mean, abs=1e-5)
    assert together.kl == pytest.approx(sum(result.kl for result in alone) / 2, rel=1e-3)


def test_a_row_counts_no_further_than_its_end() -> None:
    model, tokenizer = model_of(), byte_tokenizer()
    text = a_text(60)
    ids = torch.tensor([tokenizer.encode(text)])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)[0, 60:]
    third = said.tolist().index(said[2].item())
    model.generation_config.eos_token_id = [NUM_TOKENS - 1, said[2].item()]
    result = verify(model, tokenizer, text, **FULL)
    assert len(result.step_kl) == third + 1


def test_the_settings_of_a_patch_are_the_defaults() -> None:
    model, tokenizer = model_of(), byte_tokenizer()
    wanted = verify(model, tokenizer, a_text(150), **SMALL)
    handle = fierpatch.apply(model, **SMALL)
    assert verify(model, tokenizer, a_text(150)) == wanted
    assert verify(model, tokenizer, a_text(150), budget=32).budget == 32
    assert verify(model, tokenizer, a_text(150), config=FierConfig(budget=40)).budget == 40
    assert handle.is_attached
    assert handle.config == FierConfig(**SMALL)


def test_a_compiled_patch_is_verified_without_its_compilation() -> None:
    model = model_of()
    with fierpatch.apply(model, **SMALL, compile=True):
        assert verify(model, byte_tokenizer(), a_text(150)).tokens_attended == 48


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype_is_verified(dtype: torch.dtype) -> None:
    result = verify(model_of().to(dtype), byte_tokenizer(), a_text(150), **FULL)
    assert result.max_kl < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("is_patched", [False, True])
def test_the_model_is_left_as_it_was(is_patched: bool) -> None:
    model = model_of()
    handle = fierpatch.apply(model, budget=64) if is_patched else None
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    before = fingerprint_and_settings(model)
    reported = handle.report() if handle else None
    verify(model, byte_tokenizer(), a_text(150), **SMALL)
    assert fingerprint_and_settings(model) == before
    assert handle is None or handle.report() == reported


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.parametrize("failing_call", [1, 2, 8])
def test_an_error_leaves_the_model_as_it_was(
    is_patched: bool, failing_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prefill, in a dense step and in a patched one."""
    model = model_of()
    handle = fierpatch.apply(model, budget=64) if is_patched else None
    before = fingerprint_and_settings(model)
    calls = 0

    def fail_late(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise InterruptedError
        return next_logits(*args)

    monkeypatch.setattr("fierpatch.evaluate.verify.next_logits", fail_late)
    with pytest.raises(InterruptedError):
        verify(model, byte_tokenizer(), a_text(150), **SMALL)
    assert fingerprint_and_settings(model) == before
    assert handle is None or handle.is_attached


def fingerprint_and_settings(model: PreTrainedModel) -> Any:
    """The fingerprint and what is registered, without the random part of a patch's name."""
    name = model.config._attn_implementation
    alias = "patch" if name.startswith("fier|") else name
    return repr((fingerprint(model), sorted(registered()))).replace(name, alias)


@pytest.mark.parametrize("prompt", ["", [], ["abc", ""], 7, [7], None])
def test_a_prompt_without_text_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError):
        verify(model_of(), byte_tokenizer(pad_token="<pad>"), prompt)


def test_a_prompt_past_the_positions_is_refused() -> None:
    with pytest.raises(PromptError, match=f"{MAX_POSITIONS} positions"):
        verify(model_of(), byte_tokenizer(), a_text(MAX_POSITIONS - 5))


def test_rows_of_unequal_length_need_a_padding_token() -> None:
    model, tokenizer = model_of(), byte_tokenizer()
    with pytest.raises(TokenizerError, match="padding"):
        verify(model, tokenizer, ["ab", "abc"])
    assert verify(model, tokenizer, ["abd", "abc"], **FULL).token_agreement == 1


def test_the_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(TokenizerError, match="128"):
        verify(tiny_model("llama"), byte_tokenizer(), "ÿ")


@pytest.mark.parametrize("count", [0, -1, True, 2.0])
def test_the_number_of_steps_is_positive(count: Any) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        fierpatch.verify(model_of(), byte_tokenizer(), "abc", max_new_tokens=count)


def test_a_model_in_training_is_refused_and_left_so() -> None:
    model = model_of().train()
    with pytest.raises(ModelError):
        verify(model, byte_tokenizer(), "abc")
    assert model.training


def test_printing_tells_the_essentials() -> None:
    result = verify(model_of(), byte_tokenizer(), a_text(150), **SMALL)
    assert str(result).startswith("6 decode steps after 150 tokens, 48 attended (budget 48)\n")
    assert f"{result.token_agreement:.1%}" in str(result)
    assert "4 sparse layers" in str(result)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "rotated index, 1 bit, one list a KV head"),
        ({"bits": 2, "per_query_head": True}, "rotated index, 2 bit, one list a query head"),
        ({"index": "fier"}, "fier index, 1 bit, one list a KV head"),
        ({"refine": 2}, "rotated index, 1 bit, 2 x refined by 4 bits, one list a KV head"),
        (
            {"refine": 3, "refine_bits": "exact"},
            "rotated index, 1 bit, 3 x refined by the keys, one list a KV head",
        ),
    ],
)
def test_the_settings_and_the_bytes_of_a_step_are_told(options: dict[str, Any], line: str) -> None:
    """The bytes are those of the report of a run as long."""
    model, text = model_of(), a_text(150)
    result = verify(model, byte_tokenizer(), text, budget=24, dense_layers=1, **options)
    assert result.config == FierConfig(budget=24, dense_layers=1, **options)
    estimate = fierpatch.estimate(model, 156, settings=result.config)
    assert result.report.bytes_read == estimate.bytes_read < estimate.bytes_read_dense
    assert result.report.bytes_scanned == estimate.bytes_scanned > 0
    assert (result.report.bytes_refined > 0) == ("refine" in options)
    lines = str(result).splitlines()
    assert f"selected by      {line}" in lines
    assert f"bytes read       {estimate.reading}" in lines
    assert f"{estimate.read_fraction:.1%} of dense" in estimate.reading
    assert max(map(len, lines)) <= 100


def test_a_verification_without_a_sparse_layer_reads_what_dense_decode_reads() -> None:
    result = verify(model_of(), byte_tokenizer(), a_text(150), budget=48, dense_layers=4)
    assert result.report.read_fraction == 1
    assert "a step, 100.0% of dense" in str(result)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [FULL, SMALL])
def test_a_gpu_gives_what_the_cpu_gives(options: dict[str, int]) -> None:
    texts, tokenizer = [a_text(150), a_text(40)], byte_tokenizer(pad_token="<pad>")
    here, there = (verify(model_of().to(d), tokenizer, texts, **options) for d in ("cpu", "cuda"))
    assert there.tokens_attended == here.tokens_attended
    assert there.attention_mass == pytest.approx(here.attention_mass, abs=1e-2)
