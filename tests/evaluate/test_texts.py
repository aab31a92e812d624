"""The novel is whole, and its sentences are its words in order."""

import gzip
from importlib.resources import files

import pytest

from fierpatch.errors import ConfigError
from fierpatch.evaluate import texts


def test_the_novel_is_whole() -> None:
    novel = texts.persuasion()
    assert novel.startswith("Persuasion\n")
    assert novel.rstrip().endswith("Finis")
    assert 450_000 < len(novel) < 480_000
    assert [f"Chapter {number}\n" in novel for number in range(1, 26)] == [True] * 24 + [False]


def test_the_novel_is_packed_without_a_time() -> None:
    """So that packing it again gives the same bytes."""
    packed = (files("fierpatch") / "data" / "persuasion.txt.gz").read_bytes()
    assert packed[4:8] == bytes(4)
    assert gzip.decompress(packed) == texts.persuasion().encode("ascii")


def test_the_sentences_of_the_novel_are_its_words_in_order() -> None:
    words = texts.persuasion().split()
    first = words.index("Sir")
    chapters = {f"Chapter {number}" for number in range(2, 25)}
    body = " ".join(words[first:-1])
    for chapter in sorted(chapters, key=len, reverse=True):
        body = body.replace(f" {chapter} ", " ")
    assert " ".join(texts.filler_sentences("novel")) == body


def test_sentences_stand_on_one_line_and_do_not_end_at_a_title() -> None:
    sentences = texts.filler_sentences("novel")
    assert len(sentences) > 3000
    for sentence in sentences:
        assert sentence == " ".join(sentence.split()) != ""
        assert not sentence.endswith(("Mr.", "Mrs.", "Esq."))


def test_the_repeated_filler_is_the_classic_one() -> None:
    assert " ".join(texts.filler_sentences("repeat")) == (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )


@pytest.mark.parametrize("filler", texts.FILLERS)
def test_every_filler_has_sentences(filler: str) -> None:
    assert texts.filler_sentences(filler)


def test_an_unknown_filler_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'essay'.*'novel', 'repeat'"):
        texts.filler_sentences("essay")
