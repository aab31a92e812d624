"""The demo attends to what it says that it compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fierpatch
from fierpatch.evaluate.demo import Reading
from fierpatch.evaluate.tasks import Question
from hf.models import prompt, tiny_model
from hf.tokens import NUM_TOKENS, byte_tokenizer

BUDGET, SINKS = 48, 4


@pytest.mark.parametrize("how", ["retrieval", "newest only", "dense"])
def test_an_answer_attends_to_what_its_name_says(how: str) -> None:
    model = tiny_model("llama", vocab_size=NUM_TOKENS)
    ids = prompt(200)[0].tolist()
    questions = [Question("?", "x", (*ids, last, *range(5, 15))) for last in (2, 3)]
    handle = fierpatch.apply(model, budget=BUDGET, sinks=SINKS, dense_layers=0)
    reading = Reading(handle, byte_tokenizer(), questions, max_new_tokens=4)
    seen: list[list[int]] = []

    def observe(layer: Any, query: Any, token_indices: torch.Tensor, *rest: Any) -> None:
        newest = int(token_indices.max())
        expected = [*range(SINKS), *range(newest + 1 - BUDGET + SINKS, newest + 1)]
        seen.extend(row == expected for row in token_indices.flatten(0, 2).tolist())

    reading._cache.observe(observe)
    reading.ask(questions[0], "retrieval")
    assert not all(seen)
    seen.clear()
    reading.ask(questions[1], how)
    if how == "dense":
        assert not seen
    else:
        assert seen
        assert all(seen) is (how == "newest only")
    seen.clear()
    reading.ask(questions[0], "retrieval")  # whatever came before it
    assert seen
    assert not all(seen)
