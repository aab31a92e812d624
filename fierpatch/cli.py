"""The ``fierpatch`` command: demo, generate, estimate, verify."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fierpatch import __version__
from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError, FierError, PromptError, TokenizerError

if TYPE_CHECKING:
    import torch

# Only what --help needs is imported above: torch and transformers take seconds.

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None means those of the process.

    Returns:
        The exit status: 0; 1 for an error; 2 for a wrong command line; 130 when interrupted.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; what is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, FierError):
            text = f"{type(error).__name__}: {text} (--debug shows where)"
        print(f"fierpatch: error: {text}", file=sys.stderr)
        return 1
    return 0


def _demo(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments, budget=256)
    from fierpatch import apply
    from fierpatch.evaluate import smollm2
    from fierpatch.evaluate.demo import HOWS, Answer, Reading
    from fierpatch.evaluate.metrics import token_agreement
    from fierpatch.evaluate.tasks import demo_prompts

    if arguments.model is None:
        _say("SmolLM2-135M-Instruct, downloaded (93 MB) and converted where it is not here yet")
        arguments.model = smollm2.fetch()
    with _loaded(arguments, cpu_dtype="float32") as (model, tokenizer):
        questions = demo_prompts(tokenizer)
        with apply(model, settings) as handle:
            _say("Reading a text in which three facts are hidden, once and densely ...", end=" ")
            reading = Reading(handle, tokenizer, questions)
            _say(f"{reading.num_tokens:,} tokens in {reading.seconds:.1f} s")
            answers: dict[str, list[Answer]] = {how: [] for how in HOWS}
            for question in questions:
                _say(f"\n{question.question}")
                for how in HOWS:
                    answer = reading.ask(question, how)
                    answers[how].append(answer)
                    _say(
                        f"  {how:11} {answer.tokens_attended:5,} tokens  {answer.seconds:5.1f} s  "
                        f"{'right' if answer.is_right else 'wrong'}  {' '.join(answer.text.split())}"
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


def _generate(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    text = _prompt(arguments)
    from fierpatch import apply

    with _loaded(arguments) as (model, tokenizer):
        import torch

        from fierpatch.hf.console import stream_text

        input_ids = torch.tensor([_encode(tokenizer, text, is_chat=arguments.chat)])
        with apply(model, settings) as handle:
            stream_text(model, tokenizer, input_ids, max_new_tokens=arguments.max_new_tokens)
            if arguments.report:
                print(handle.report(), file=sys.stderr)


def _estimate(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    from fierpatch import estimate
    from fierpatch.hf.checkpoints import load_config
    from fierpatch.hf.console import quiet

    with quiet(not arguments.debug):
        config = load_config(arguments.model)
    dtype = None if arguments.dtype == "auto" else arguments.dtype
    print(estimate(config, arguments.context, arguments.batch, dtype=dtype, settings=settings))


def _verify(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    text = _prompt(arguments)
    from fierpatch import verify

    with _loaded(arguments) as (model, tokenizer):
        print(
            verify(
                model, tokenizer, text, max_new_tokens=arguments.max_new_tokens, config=settings
            )
        )


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fierpatch: error: {message} (try: {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fierpatch",
        description="Decode attends to the best tokens of a long context, found by a 1-bit index.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fierpatch {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and all messages")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(command=run)
        # Suppressed, lest its default overrule the one before the command.
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        return command

    demo = add("demo", _demo, "find three facts in a long text: dense, retrieval, newest only")
    demo.add_argument("--model", metavar="ID_OR_PATH", help="SmolLM2-135M-Instruct by default")
    _add_placement(demo)
    _add_settings(demo)

    generate = add("generate", _generate, "continue a prompt greedily, as it comes")
    _add_model_and_prompt(generate, num_tokens=256)
    generate.add_argument("--chat", action="store_true", help="put the prompt as a user's message")
    generate.add_argument("--report", action="store_true", help="print what was read, to stderr")

    estimate = add("estimate", _estimate, "what a context needs and a step reads, without weights")
    estimate.add_argument("--model", metavar="ID_OR_PATH", required=True)
    estimate.add_argument("--context", metavar="TOKENS", type=_positive, required=True)
    estimate.add_argument("--batch", metavar="ROWS", type=_positive, default=1)
    estimate.add_argument("--dtype", choices=_DTYPES, default="auto", help="of K and V")
    _add_settings(estimate)

    verify = add("verify", _verify, "compare retrieval with dense decode on a prompt of yours")
    _add_model_and_prompt(verify, num_tokens=32)
    return parser


def _add_model_and_prompt(command: argparse.ArgumentParser, num_tokens: int) -> None:
    command.add_argument("--model", metavar="ID_OR_PATH", required=True)
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text; - is standard input")
    command.add_argument(
        "--max-new-tokens", metavar="N", type=_positive, default=num_tokens, help=f"{num_tokens}"
    )
    _add_placement(command)
    _add_settings(command)


def _add_placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights")
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; by default auto")


def _add_settings(command: argparse.ArgumentParser) -> None:
    """One option for every field of `FierConfig`, described in its own words."""
    group = command.add_argument_group("settings of the patch")
    described = _described_fields()
    for field in dataclasses.fields(FierConfig):
        flag = "--" + field.name.replace("_", "-")
        text = described.get(field.name, "")
        if isinstance(field.default, int | str) and not isinstance(field.default, bool):
            text += f" (default {field.default})"
        if isinstance(field.default, bool):
            group.add_argument(
                flag, action="store_true", default=argparse.SUPPRESS, help=text, dest=field.name
            )
        else:
            kind = str if isinstance(field.default, str) else int
            group.add_argument(
                flag,
                type=kind,
                metavar="NAME" if kind is str else "N",
                default=argparse.SUPPRESS,
                help=text,
                dest=field.name,
            )


def _described_fields() -> dict[str, str]:
    """The first sentence on each field in the docstring of `FierConfig`, which -OO takes away."""
    entries = re.findall(
        r"^    (\w+): (.*(?:\n        .*)*)", inspect.getdoc(FierConfig) or "", re.MULTILINE
    )
    sentences = {name: " ".join(text.split()).split(". ")[0] for name, text in entries}
    return {
        name: sentence.rstrip(".").replace("`", "").replace("%", "%%")
        for name, sentence in sentences.items()
    }


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


_positive.__name__ = "number"  # what argparse calls it


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)
