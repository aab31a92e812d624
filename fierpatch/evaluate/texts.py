"""Texts to evaluate on: a public-domain novel, and the fillers that answers are hidden in."""

from __future__ import annotations

import gzip
import re
from importlib.resources import files

from fierpatch.errors import ConfigError

FILLERS = ("novel", "repeat")

# The filler of the passkey task of Mohtashami and Jaggi, Landmark Attention (arXiv 2305.16300).
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
    """Jane Austen's *Persuasion* (1818): 0.47 MB of ASCII text in the lines of a printed page."""
    compressed = files("fierpatch") / "data" / "persuasion.txt.gz"
    return gzip.decompress(compressed.read_bytes()).decode("ascii")


def filler_sentences(filler: str) -> tuple[str, ...]:
    """The sentences of a filler, in order, each on one line without spaces around it.

    Args:
        filler: ``"novel"``, the sentences of `persuasion`; or ``"repeat"``, the five of the classic
            passkey task ("The grass is green. The sky is blue. ..."), to be repeated.

    Raises:
        ConfigError: there is no such filler.
    """
    if filler == "repeat":
        return _REPEAT
    if filler == "novel":
        chapters = _CHAPTER.split(persuasion().rstrip().removesuffix("Finis"))[1:]
        return tuple(_SENTENCE_END.split(" ".join(" ".join(chapters).split())))
    choices = ", ".join(map(repr, FILLERS))
    raise ConfigError(f"unknown filler {filler!r}: choose from {choices}")
