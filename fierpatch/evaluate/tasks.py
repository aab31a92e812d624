"""Tasks: prompts of an exact length, for any tokenizer, whose answers lie far back in the context."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, Protocol

from fierpatch import errors
from fierpatch.evaluate import texts


class Tokenizer(Protocol):
    """What the tasks ask of a tokenizer; those of transformers have it."""

    chat_template: Any
    bos_token_id: Any

    def encode(self, text: Any, *, add_special_tokens: bool = ...) -> Any:
        """Token ids of a text."""

    def apply_chat_template(self, conversation: Any, *, tokenize: bool = ..., add_generation_prompt: bool = ...) -> Any:
        """The text of a conversation, up to where the assistant is to answer."""


@dataclass(frozen=True)
class Passkey:
    """A prompt that hides a 5-digit key, the key, and the question that ends the prompt."""

    prompt_ids: tuple[int, ...]
    answer: str
    question: str
    key_start: int
    """Position of the first token of the sentence that holds the key."""


INTRODUCTION = "There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
ANSWER_PREFIX = "The pass key is"


def passkey(tokenizer: Tokenizer, num_tokens: int, depth: float, filler: str, seed: int) -> Passkey:
    chance = random.Random(seed)
    key = f"{chance.randrange(10_000, 100_000)}"
    sentences = texts.filler_sentences(filler)
    start = chance.randrange(len(sentences))
    head, tail = _frame(tokenizer, INTRODUCTION, QUESTION)
    tail = tail + _ids(tokenizer, ANSWER_PREFIX)
    needle = _ids(tokenizer, " " + NEEDLE.format(key=key))
    num_filler = num_tokens - len(head) - len(tail) - len(needle)
    filling, boundaries = _fill(tokenizer, islice(cycle(sentences), start, None), num_filler)
    at = min(boundaries, key=lambda boundary: abs(boundary - depth * num_filler))
    ids = (*head, *filling[:at], *needle, *filling[at:], *tail)
    return Passkey(ids, key, QUESTION, len(head) + at)


def _ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def _fill(tokenizer, sentences, num_tokens):
    ids, boundaries = [], [0]
    for sentence in sentences:
        ids += _ids(tokenizer, " " + sentence)
        if len(ids) >= num_tokens:
            break
        boundaries.append(len(ids))
    return ids[:num_tokens], boundaries


def _frame(tokenizer, introduction, question):
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{introduction}\n\n\0\n\n{question}"}], tokenize=False, add_generation_prompt=True)
    else:
        text = f"{introduction}\n\n\0\n\n{question}\n"
    head, tail = text.split("\0")
    return _ids(tokenizer, head), _ids(tokenizer, tail)
