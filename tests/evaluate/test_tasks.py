"""Prompts are of the asked length with any tokenizer, and hide what they ask for."""

import functools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fierpatch.errors import ConfigError, PromptError
from fierpatch.evaluate import tasks, texts

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
KINDS = ("bytes", "words", "opening", "chat")

kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 1000)
lengths = st.integers(600, 3000)  # with one token a character the question alone takes 200
depths = st.floats(0, 1)
fillers = st.sampled_from(texts.FILLERS)


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One token a byte, or merged; with an opening token, or a chat template, or neither."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=258 if kind == "bytes" else 400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.filler_sentences("novel")[:200], trainer)
    if kind == "opening":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A <|end|>",
            special_tokens=[(token, i) for i, token in enumerate(special)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        chat_template=CHAT_TEMPLATE if kind == "chat" else None,
    )


@given(kinds, lengths, depths, fillers, seeds)
def test_a_passkey_prompt_has_the_asked_length_and_hides_the_key(
    kind: str, num_tokens: int, depth: float, filler: str, seed: int
) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tasks.passkey(tokenizer, num_tokens, depth, filler, seed)
    assert len(prompt.prompt_ids) == num_tokens
    assert re.fullmatch(r"[1-9]\d{4}", prompt.answer)
    text = tokenizer.decode(prompt.prompt_ids)
    assert text.count(prompt.answer) == 2
    assert tasks.found(prompt.answer, text)
    assert prompt.question in text[-100:]


@given(depths, fillers, seeds)
@example(0.0, "repeat", 0)
@example(1.0, "repeat", 0)
def test_the_key_lies_at_the_sentence_nearest_the_asked_depth(
    depth: float, filler: str, seed: int
) -> None:
    tokenizer = tokenizer_of("bytes")
    prompt = tasks.passkey(tokenizer, 5000, depth, filler, seed)
    text = tokenizer.decode(prompt.prompt_ids)
    before, after = re.split(r" The pass key is the number .* is the pass key\.", text)
    filler_before = before.partition("\n\n")[2]
    filler_after = after.partition("\n\n")[0]
    assert filler_before[-1:] in {"", ".", "!", "?", '"', "'"}
    share = len(filler_before) / len(filler_before + filler_after)
    longest = max(map(len, texts.filler_sentences(filler)))
    assert abs(share - depth) * len(filler_before + filler_after) <= longest + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_passkey_prompt_too_short_for_the_key_names_the_least_length(kind: str) -> None:
    with pytest.raises(ConfigError) as raised:
        tasks.passkey(tokenizer_of(kind), 10, 0.5, "repeat", 0)
    least = int(re.findall(r"at least (\d+)", str(raised.value))[0])
    prompt = tasks.passkey(tokenizer_of(kind), least, 0.5, "repeat", 0)
    assert len(prompt.prompt_ids) == least
    with pytest.raises(ConfigError):
        tasks.passkey(tokenizer_of(kind), least - 1, 0.5, "repeat", 0)


def test_a_seed_gives_one_prompt() -> None:
    tokenizer = tokenizer_of("chat")
    once, again, other = (tasks.passkey(tokenizer, 900, 0.5, "novel", seed) for seed in (7, 7, 8))
    assert once == again
    assert once.answer != other.answer


def test_a_prompt_longer_than_the_novel_starts_it_again() -> None:
    tokenizer = tokenizer_of("words")
    whole = sum(len(tokenizer.encode(" " + s)) for s in texts.filler_sentences("novel"))
    prompt = tasks.passkey(tokenizer, whole + 2000, 0.5, "novel", 0)
    assert len(prompt.prompt_ids) == whole + 2000


@pytest.mark.parametrize("depth", [-0.1, 1.5, float("nan")])
def test_a_depth_outside_the_text_is_an_error(depth: float) -> None:
    with pytest.raises(ConfigError, match="depth"):
        tasks.passkey(tokenizer_of("chat"), 900, depth, "repeat", 0)


def test_a_chat_template_frames_the_prompt() -> None:
    tokenizer = tokenizer_of("chat")
    text = tokenizer.decode(tasks.passkey(tokenizer, 900, 0.5, "repeat", 0).prompt_ids)
    assert text.startswith("<|start|>user\nThere is a pass key")
    assert text.endswith("\n\nWhat number is the pass key?<|end|>\n<|start|>assistant\n")
    assert "\0" not in text


def test_without_one_the_prompt_opens_as_the_tokenizer_opens_a_text() -> None:
    opened = tokenizer_of("opening")
    ids = tasks.passkey(opened, 900, 0.5, "repeat", 0).prompt_ids
    assert ids.index(opened.bos_token_id) == 0
    assert ids.count(opened.bos_token_id) == 1
    assert opened.eos_token_id not in ids
    plain = tokenizer_of("words")
    assert plain.bos_token_id not in tasks.passkey(plain, 900, 0.5, "repeat", 0).prompt_ids


@given(kinds, st.integers(1, 300), st.integers(0, 300))
def test_a_second_copy_is_the_first_after_the_gap(kind: str, num_tokens: int, gap: int) -> None:
    tokenizer = tokenizer_of(kind)
    text = texts.persuasion()[:5000]
    copy = tasks.second_copy(tokenizer, text, num_tokens, gap)
    assert (copy.start, copy.stop) == (num_tokens + gap, len(copy.ids))
    assert copy.ids[copy.start : copy.stop] == copy.ids[:num_tokens]
    assert text.startswith(tokenizer.decode(copy.ids[: copy.start]))


def test_a_text_too_short_for_a_second_copy_is_an_error() -> None:
    with pytest.raises(PromptError, match=r"has 5 tokens.* need 6"):
        tasks.second_copy(tokenizer_of("bytes"), "short", num_tokens=4, gap=2)


@pytest.mark.parametrize(("num_tokens", "gap"), [(0, 4), (4, -1)])
def test_a_second_copy_of_nothing_is_an_error(num_tokens: int, gap: int) -> None:
    with pytest.raises(ConfigError):
        tasks.second_copy(tokenizer_of("bytes"), "a short text", num_tokens, gap)


@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_asks_three_questions_about_one_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    questions = tasks.demo_prompts(tokenizer)
    assert len({question.expected for question in questions}) == 3
    for question in questions:
        assert not tasks.found(question.expected, texts.persuasion())
        text = tokenizer.decode(question.prompt_ids)
        haystack, asked = text.rsplit("\n\n", 1)
        assert tasks.found(question.expected, haystack)
        assert question.question in asked
        assert not tasks.found(question.expected, asked)
        assert haystack == tokenizer.decode(questions[0].prompt_ids).rsplit("\n\n", 1)[0]


@given(st.integers(10_000, 99_999), st.integers(0, 9))
def test_a_key_is_found_as_a_whole_number_only(key: int, digit: int) -> None:
    assert tasks.found(str(key), f"The pass key is {key}.")
    assert not tasks.found(str(key), f"The pass key is {key}{digit}.")
    assert not tasks.found(str(key), f"The pass key is {digit}{key}.")


def test_a_word_is_found_in_capitals_and_quotes_but_not_in_another() -> None:
    assert tasks.found("Marmalade", 'It is called "MARMALADE".')
    assert not tasks.found("cinnamon", "cinnamons")
    assert not tasks.found("a.c", "abc")
