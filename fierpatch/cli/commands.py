"""What each command does: demo, generate, estimate, verify, plot."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError, PromptError, TokenizerError

if TYPE_CHECKING:
    import torch

# Only what --help needs is imported above: torch and transformers take seconds.


def demo(arguments: argparse.Namespace) -> None:
    """Hide three facts in a long text and ask for them densely, by retrieval, and without it."""
    settings = _settings(arguments, budget=256)
    import fierpatch
    from fierpatch.evaluate import smollm2
    from fierpatch.evaluate.demo import HOWS, Answer, Reading
    from fierpatch.evaluate.metrics import token_agreement
    from fierpatch.evaluate.tasks import demo_prompts

    if arguments.model is None:
        _say("Model: SmolLM2-135M-Instruct (the first time a download of 93 MB)")
        arguments.model = smollm2.fetch()
    with _loaded(arguments, cpu_dtype="float32") as (model, tokenizer):
        questions = demo_prompts(tokenizer)
        with fierpatch.apply(model, settings) as handle:
            how = "densely" if settings.prefill == "dense" else "sparsely"
            _say(f"Reading a text in which three facts are hidden, once and {how} ...", end=" ")
            reading = Reading(handle, tokenizer, questions)
            _say(f"{reading.num_tokens:,} tokens in {reading.seconds:.1f} s")
            answers: dict[str, list[Answer]] = {how: [] for how in HOWS}
            for question in questions:
                _say(f"\n{question.question}")
                for how in HOWS:
                    answer = reading.ask(question, how)
                    answers[how].append(answer)
                    verdict = "right" if answer.is_right else "wrong"
                    _say(
                        f"  {how:11} {answer.tokens_attended:5,} tokens  {answer.seconds:5.1f} s  "
                        f"{verdict}  {' '.join(answer.text.split())}"
                    )
    right = {how: sum(answer.is_right for answer in given) for how, given in answers.items()}
    _say(f"\nright, of {len(questions)}: " + ", ".join(f"{how} {n}" for how, n in right.items()))
    agreement = [
        token_agreement(dense.token_ids, retrieved.token_ids)
        for dense, retrieved in zip(answers["dense"], answers["retrieval"], strict=True)
    ]
    report = answers["retrieval"][-1].report
    ratios = [layer.key_access_ratio for layer in report.layers if layer.kind == "sparse"]
    _say(
        f"tokens that retrieval and dense share: {sum(agreement) / len(agreement):.0%}\n"
        f"keys read in a sparse layer, index included: {max(ratios, default=1):.1%} of dense\n\n"
        f"{report}"
    )


def generate(arguments: argparse.Namespace) -> None:
    """Continue a prompt greedily through retrieval, and print the text as it comes."""
    settings = _settings(arguments)
    text = _prompt(arguments)
    import torch

    import fierpatch
    from fierpatch.hf.console import stream_text

    with _loaded(arguments) as (model, tokenizer):
        input_ids = torch.tensor([_encode(tokenizer, text, is_chat=arguments.chat)])
        with fierpatch.apply(model, settings) as handle:
            stream_text(model, tokenizer, input_ids, max_new_tokens=arguments.max_new_tokens)
            if arguments.report:
                print(handle.report(), file=sys.stderr)


def estimate(arguments: argparse.Namespace) -> None:
    """Print the tokens and bytes of a context, from the configuration alone."""
    settings = _settings(arguments)
    import fierpatch
    from fierpatch.hf.checkpoints import load_config
    from fierpatch.hf.console import quiet

    with quiet(not arguments.debug):
        config = load_config(arguments.model)
    dtype = None if arguments.dtype == "auto" else arguments.dtype
    print(
        fierpatch.estimate(
            config, arguments.context, arguments.batch, dtype=dtype, settings=settings
        )
    )


def verify(arguments: argparse.Namespace) -> None:
    """Print how retrieval compares with dense decode on a prompt."""
    settings = _settings(arguments)
    text = _prompt(arguments)
    import fierpatch

    with _loaded(arguments) as (model, tokenizer):
        num_steps = arguments.max_new_tokens
        print(fierpatch.verify(model, tokenizer, text, max_new_tokens=num_steps, config=settings))


def plot(arguments: argparse.Namespace) -> None:
    """Draw which blocks of a text the sparse prefill of a layer and query head attends."""
    settings = _settings(arguments, prefill="sparse")
    text = _prompt(arguments)
    import torch

    from fierpatch.evaluate.block_plot import block_names, plot_blocks, prompt_blocks

    with _loaded(arguments) as (model, tokenizer):
        ids = _encode(tokenizer, text, is_chat=False)
        input_ids = torch.tensor([ids], device=model.device)
        heads = prompt_blocks(model, input_ids, settings, arguments.layer)
    if arguments.head >= len(heads):
        raise ConfigError(
            f"--head {arguments.head}: the layer has query heads 0 to {len(heads) - 1}"
        )
    title = f"layer {arguments.layer}, query head {arguments.head}, mass {settings.prefill_mass}"
    names = block_names(tokenizer, ids)
    density = plot_blocks(heads[arguments.head], names, title, arguments.output)
    _say(f"{arguments.output}: {density:.1%} of the causal blocks of {len(ids):,} tokens")


@contextmanager
def _loaded(arguments: argparse.Namespace, cpu_dtype: str = "auto") -> Iterator[tuple[Any, Any]]:
    """The model and its tokenizer, within a block in which transformers is quiet."""
    import torch

    from fierpatch.hf.checkpoints import load
    from fierpatch.hf.console import quiet

    device = _device(arguments.device)
    name = arguments.dtype
    if name == "auto" and device.type == "cpu":
        name = cpu_dtype
    dtype = None if name == "auto" else getattr(torch, name)
    with quiet(not arguments.debug):
        yield load(arguments.model, dtype=dtype, device=device)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(f"--device {name} cannot be used here: {reason}") from error
    return device


def _prompt(arguments: argparse.Namespace) -> str:
    """The text of --prompt or of --prompt-file."""
    text = arguments.prompt
    if text is None:
        name = arguments.prompt_file
        try:
            content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        except OSError as error:
            raise PromptError(f"the prompt file {name} cannot be read: {error.strerror}") from error
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise PromptError(
                f"the prompt file {name} is not UTF-8 text: byte {error.start} is "
                f"0x{content[error.start]:02x}"
            ) from error
        if "\0" in text:
            raise PromptError(f"the prompt file {name} is binary: it holds a NUL character")
    if not text.strip():
        raise PromptError("the prompt is empty: give a text of at least one token")
    return str(text)


def _encode(tokenizer: Any, text: str, *, is_chat: bool) -> list[int]:
    if not is_chat:
        return list(tokenizer.encode(text, verbose=False))
    if not tokenizer.chat_template:
        raise TokenizerError("the tokenizer has no chat template: leave out --chat")
    message = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer.encode(message, add_special_tokens=False, verbose=False))


def _settings(arguments: argparse.Namespace, **defaults: Any) -> FierConfig:
    names = [field.name for field in dataclasses.fields(FierConfig)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return FierConfig.from_dict({**defaults, **given})


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)
