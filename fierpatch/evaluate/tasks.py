"""Tasks: prompts, for any tokenizer, whose answers lie far back in the context."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Protocol

from fierpatch.errors import ConfigError, PromptError
from fierpatch.evaluate import texts

_INTRODUCTION = (
    "There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it."
)
_NEEDLE = "The pass key is the number {key}. Remember it. The number {key} is the pass key."
_QUESTION = "What number is the pass key?"

_DEMO_INTRODUCTION = "Read this text carefully. There is a question about it at the end."
_DEMO_TOKENS = 3500  # of the excerpt; with needles and question about 3,610
_DEMO = (  # depth, needle, question, expected
    (0.15, _NEEDLE.format(key=48213), _QUESTION, "48213"),
    (
        0.45,
        "Captain Harville's parrot is called Marmalade.",
        "What is the name of Captain Harville's parrot?",
        "Marmalade",
    ),
    (
        0.75,
        "The secret ingredient in the cook's soup is cinnamon.",
        "What is the secret ingredient in the cook's soup?",
        "cinnamon",
    ),
)


class Tokenizer(Protocol):
    """What the tasks ask of a tokenizer; those of transformers have it."""

    chat_template: Any
    """Falsy where the tokenizer has none: the prompt is then plain text."""
    bos_token_id: Any
    """What opens a plain text where the tokenizer itself puts it there."""

    def encode(
        self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...
    ) -> Sequence[int]:
        """Token ids of a text; with `verbose` False it does not warn of a long one."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool = ...,
        add_generation_prompt: bool = ...,
    ) -> Any:
        """The text of a conversation, up to where the assistant is to answer."""


@dataclass(frozen=True)
class Passkey:
    """A prompt that hides a 5-digit key in a filler and ends by asking for it."""

    prompt_ids: tuple[int, ...]
    answer: str
    question: str


@dataclass(frozen=True)
class Question:
    """A prompt that ends with a question, and what the answer must contain."""

    question: str
    expected: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class SecondCopy:
    """A text, more text, and the first text again at ``ids[start:stop]``."""

    ids: tuple[int, ...]
    start: int
    stop: int


def passkey(tokenizer: Tokenizer, num_tokens: int, depth: float, filler: str, seed: int) -> Passkey:
    """A passkey prompt of exactly `num_tokens` tokens, chat template included.

    The task is that of Mohtashami and Jaggi (arXiv 2305.16300). The prompt, a user's message where
    the tokenizer has a chat template::

        There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it.

        ... The pass key is the number 12345. Remember it. The number 12345 is the pass key. ...

        What number is the pass key?

    Nothing is put in the assistant's mouth, so a model first says "The pass key is" and every digit
    comes out of decode. Generate 16 tokens and judge them by `found`.

    Args:
        tokenizer: any tokenizer of transformers.
        num_tokens: length of the prompt.
        depth: share of the filler that precedes the key, 0 to 1; the key goes to the start of the
            sentence nearest to it.
        filler: ``"novel"`` or ``"repeat"``, see `texts.filler_sentences`.
        seed: draws the key and the sentence that the filler starts with.

    Raises:
        ConfigError: `num_tokens` is too small for key and question, or `depth` or `filler` is bad.
    """
    sentences = texts.filler_sentences(filler)
    chance = random.Random(seed)
    key = str(chance.randrange(10_000, 100_000))
    start = chance.randrange(len(sentences))
    head, tail = _frame(tokenizer, _INTRODUCTION, _QUESTION)
    needle = _encode(tokenizer, " " + _NEEDLE.format(key=key))
    num_filler = num_tokens - len(head) - len(needle) - len(tail)
    if num_filler < 0:
        raise ConfigError(
            f"num_tokens={num_tokens} leaves no room for the key and the question: "
            f"give at least {num_tokens - num_filler} with this tokenizer"
        )
    rotated = islice(cycle(sentences), start, None)
    haystack = _hide(tokenizer, {depth: needle}, rotated, num_filler)
    return Passkey((*head, *haystack, *tail), key, _QUESTION)


def second_copy(
    tokenizer: Tokenizer, text: str, num_tokens: int = 1024, gap: int = 1024
) -> SecondCopy:
    """The first `num_tokens` tokens of a text, the `gap` tokens after them, then the first again.

    A model that sees its whole context predicts the second copy almost perfectly; the logits at
    ``start - 1`` to ``stop - 2`` are those that predict it.

    Args:
        tokenizer: any tokenizer of transformers.
        text: `texts.persuasion` or another text that does not repeat itself.
        num_tokens: length of a copy.
        gap: tokens between the copies.

    Raises:
        ConfigError: `num_tokens` is below 1 or `gap` below 0.
        PromptError: the text is too short.
    """
    if num_tokens < 1 or gap < 0:
        raise ConfigError(
            f"num_tokens={num_tokens} and gap={gap}: give at least 1 and at least 0 tokens"
        )
    start = num_tokens + gap
    ids = _encode(tokenizer, text)
    if len(ids) < start:
        raise PromptError(
            f"the text has {len(ids)} tokens, but num_tokens={num_tokens} and gap={gap} "
            f"need {start}: give a longer text or smaller numbers"
        )
    return SecondCopy((*ids[:start], *ids[:num_tokens]), start, start + num_tokens)


def demo_prompts(tokenizer: Tokenizer) -> list[Question]:
    """Three questions about one excerpt of *Persuasion* in which their answers are hidden.

    The excerpt has 3,500 tokens and is the same in each prompt: a pass key and two facts that the
    novel does not know lie at different depths. Dense SmolLM2-135M-Instruct answers all three by
    greedy decoding within 24 tokens; judge by `found`.
    """
    sentences = texts.filler_sentences("novel")
    needles = {depth: _encode(tokenizer, " " + needle) for depth, needle, _, _ in _DEMO}
    haystack = _hide(tokenizer, needles, sentences, _DEMO_TOKENS)
    questions = []
    for _, _, question, expected in _DEMO:
        head, tail = _frame(tokenizer, _DEMO_INTRODUCTION, question)
        questions.append(Question(question, expected, (*head, *haystack, *tail)))
    return questions


def found(answer: str, generated_text: str) -> bool:
    """Does the text contain the answer, as a whole word or number, in capitals or not?"""
    return bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", generated_text, re.IGNORECASE))


def _hide(
    tokenizer: Tokenizer,
    needles: dict[float, Sequence[int]],
    sentences: Iterable[str],
    num_filler: int,
) -> list[int]:
    """`num_filler` tokens of sentences with each needle at the sentence start nearest its depth."""
    filler: list[int] = []
    starts: list[int] = []
    for sentence in sentences:
        starts.append(len(filler))
        filler += _encode(tokenizer, " " + sentence)
        if len(filler) >= num_filler:
            break
    del filler[num_filler:]
    haystack: list[int] = []
    done = 0
    for depth, needle in sorted(needles.items()):
        if not 0 <= depth <= 1:
            raise ConfigError(f"depth={depth} is not a share of the text: give 0 to 1")
        nearest = min(starts, key=lambda start: abs(start - depth * num_filler))
        haystack += [*filler[done:nearest], *needle]
        done = nearest
    return [*haystack, *filler[done:]]


def _frame(
    tokenizer: Tokenizer, introduction: str, question: str
) -> tuple[Sequence[int], Sequence[int]]:
    """Token ids of all that comes before the haystack, and of all that comes after it."""
    message = f"{introduction}\n\n\0\n\n{question}"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        opening = []
    else:
        text = message + "\n"
        # Some tokenizers open a text with a token, others close it: only the first is wanted.
        opening = [token for token in tokenizer.encode("") if token == tokenizer.bos_token_id][:1]
    head, tail = text.split("\0")
    return [*opening, *_encode(tokenizer, head)], _encode(tokenizer, tail)


def _encode(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)
