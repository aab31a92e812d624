"""The demo: a long text read once and asked about densely, by retrieval and by its end alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fierpatch.evaluate.tasks import Question, found
from fierpatch.hf.decoding import Bookmark, next_logits
from fierpatch.patching import Handle
from fierpatch.report import Report

HOWS = ("dense", "retrieval", "newest only")


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer.
        token_ids: its tokens, the one that ends it included.
        is_right: whether the expected words are in it.
        tokens_attended: tokens that a step of a sparse layer attended.
        seconds: reading the question and decoding the answer.
        report: tokens and bytes of the cache when the answer was done.
    """

    text: str
    token_ids: tuple[int, ...]
    is_right: bool
    tokens_attended: int
    seconds: float
    report: Report


class Reading:
    """A text in a cache, read once and densely, that can be asked again and again.

    Each question is read densely too, being longer than ``max_query_length``; all tokens of the
    answer but the first come out of decode.

    Args:
        handle: the patch on the model that reads.
        tokenizer: the model's.
        questions: prompts that begin alike; what they share is read.
        max_new_tokens: of an answer.

    Attributes:
        num_tokens: tokens of the shared text.
        seconds: what reading it took.
    """

    def __init__(
        self,
        handle: Handle,
        tokenizer: Any,
        questions: Sequence[Question],
        *,
        max_new_tokens: int = 24,
    ) -> None:
        self.num_tokens = _num_shared([question.prompt_ids for question in questions])
        self._handle = handle
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        longest = max(len(question.prompt_ids) for question in questions)
        self._cache = handle.new_cache(longest + max_new_tokens)
        input_ids = self._tensor(questions[0].prompt_ids[: self.num_tokens])
        start = time.perf_counter()
        with torch.no_grad():
            next_logits(handle.model, input_ids, torch.ones_like(input_ids), self._cache)
        self.seconds = time.perf_counter() - start
        self._bookmark = Bookmark(self._cache)

    def ask(self, question: Question, how: str) -> Answer:
        """Answer greedily; then the text is all the cache holds again.

        Args:
            question: one of those that the text was read for.
            how: ``"dense"``; ``"retrieval"``; or ``"newest only"``, a budget of the same size that
                the first and the last tokens of the context fill, for comparison.
        """
        input_ids = self._tensor(question.prompt_ids)
        start = time.perf_counter()
        with self._attending(how):
            output = self._handle.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=self._cache,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
        seconds = time.perf_counter() - start
        report = self._handle.report(self._cache)
        self._bookmark.restore()
        token_ids = output[0, input_ids.shape[1] :].tolist()
        text = str(self._tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
        sparse = (layer for layer in report.layers if how != "dense" and layer.kind == "sparse")
        attended = max(
            (layer.tokens_attended for layer in sparse),
            default=max(layer.tokens for layer in report.layers),
        )
        is_right = found(question.expected, text)
        return Answer(text, tuple(token_ids), is_right, attended, seconds, report)

    @contextmanager
    def _attending(self, how: str) -> Iterator[None]:
        if how == "dense":
            with self._handle.disabled():
                yield
            return
        settings = self._handle.config
        if how == "newest only":
            settings = settings.replace(recent=settings.budget - settings.sinks)
        stores = self._cache.stores.values()
        for store in stores:
            store.configure(settings)
        try:
            yield
        finally:
            for store in stores:
                store.configure(self._handle.config)

    def _tensor(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([token_ids], device=self._handle.model.device)


def _num_shared(prompts: Sequence[Sequence[int]]) -> int:
    shared = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    # At least one token must be left to read with the question.
    return min(shared, min(map(len, prompts)) - 1)
