"""Texts to evaluate on: a public-domain novel, and the fillers that passkeys are hidden in."""

from __future__ import annotations

import gzip
import re
from importlib.resources import files

from fierpatch import errors

FILLERS = ("novel", "repeat")

# Mohtashami and Jaggi, Landmark Attention (arXiv 2305.16300), appendix: the passkey task's filler.
_REPEAT = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_CHAPTER = re.compile(r"^Chapter \d+$", re.MULTILINE)
_SENTENCE_END = re.compile(
    r"(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!Esq\.)(?<!St\.)"
    r"(?:(?<=[.!?])|(?<=[.!?][\"']))\s+(?=[\"'_(]?[A-Z])"
)


def persuasion() -> str:
    """Jane Austen's *Persuasion* (1818), 0.47 MB of plain ASCII text with the lines of the printed page."""
    return gzip.decompress((files("fierpatch") / "data" / "persuasion.txt.gz").read_bytes()).decode("ascii")


def filler_sentences(filler: str) -> tuple[str, ...]:
    """The sentences of a filler, in order and without surrounding whitespace.

    Args:
        filler: ``"novel"`` (the sentences of *Persuasion*) or ``"repeat"`` (the passkey task's classic
            "The grass is green. The sky is blue. ...", to be cycled).

    Raises:
        ConfigError: no such filler.
    """
    if filler == "repeat":
        return _REPEAT
    if filler == "novel":
        chapters = _CHAPTER.split(persuasion().removesuffix("\n").removesuffix("Finis"))[1:]
        text = " ".join(" ".join(chapter.split()) for chapter in chapters)
        return tuple(_SENTENCE_END.split(text))
    raise errors.ConfigError(f"unknown filler {filler!r}: choose from {', '.join(map(repr, FILLERS))}")
