"""The command line: its commands and their options, those of `FierConfig` among them."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fierpatch import __version__
from fierpatch.cli import commands
from fierpatch.config import FierConfig

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fierpatch: error: {message} (try: {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser; what it parses has the function to call as `command`."""
    parser = _Parser(
        prog="fierpatch",
        description="Decode attends to the best tokens of a long context, found by a 1-bit index.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fierpatch {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and all messages")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        command = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(command=run)
        # Suppressed, lest its default overrule the one before the command.
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        return command

    demo = add("demo", commands.demo, "find three facts hidden in a long text")
    demo.add_argument("--model", metavar="ID_OR_PATH", help="SmolLM2-135M-Instruct by default")
    _add_placement(demo)
    _add_settings(demo)

    generate = add("generate", commands.generate, "continue a prompt greedily, as it comes")
    _add_model_and_prompt(generate, num_tokens=256)
    generate.add_argument("--chat", action="store_true", help="put the prompt as a user's message")
    generate.add_argument("--report", action="store_true", help="print what was read, to stderr")

    estimate = add("estimate", commands.estimate, "what a context costs, from the configuration")
    estimate.add_argument("--model", metavar="ID_OR_PATH", required=True)
    estimate.add_argument("--context", metavar="TOKENS", type=_positive, required=True)
    estimate.add_argument("--batch", metavar="ROWS", type=_positive, default=1)
    estimate.add_argument("--dtype", choices=_DTYPES, default="auto", help="of K and V")
    _add_settings(estimate)

    verify = add("verify", commands.verify, "compare retrieval with dense decode")
    _add_model_and_prompt(verify, num_tokens=32)

    plot = add("plot", commands.plot, "draw the blocks of a text that sparse prefill attends")
    plot.add_argument("--layer", metavar="N", type=_not_negative, required=True)
    plot.add_argument("--head", metavar="N", type=_not_negative, default=0, help="query head")
    plot.add_argument("--output", metavar="FILE", type=Path, default=Path("blocks.png"))
    _add_model_and_prompt(plot)
    return parser


def _add_model_and_prompt(command: argparse.ArgumentParser, num_tokens: int | None = None) -> None:
    command.add_argument("--model", metavar="ID_OR_PATH", required=True)
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text; - is standard input")
    if num_tokens is not None:
        command.add_argument(
            "--max-new-tokens",
            metavar="N",
            type=_positive,
            default=num_tokens,
            help=f"tokens to decode at most (default {num_tokens})",
        )
    _add_placement(command)
    _add_settings(command)


def _add_placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights")
    command.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:1 (default: what is there)"
    )


def _add_settings(command: argparse.ArgumentParser) -> None:
    """One option for every field of `FierConfig`, described in its own words."""
    group = command.add_argument_group("settings of the patch")
    described = _described_fields()
    for field in dataclasses.fields(FierConfig):
        name, text = field.name, described.get(field.name, "")
        flag = "--" + name.replace("_", "-")
        # Absent unless given, so that FierConfig alone knows the defaults.
        absent = argparse.SUPPRESS
        if isinstance(field.default, bool):
            group.add_argument(flag, dest=name, action="store_true", default=absent, help=text)
            continue
        if field.default is not None:
            text += f" (default {field.default})"
        kind: Callable[[str], float | str] = int
        if isinstance(field.default, str | float):
            kind = type(field.default)
        metavar = "NAME" if kind is str else "N"
        if field.type == "int | str":
            kind, metavar = _number_or_name, "N|NAME"
        group.add_argument(flag, dest=name, type=kind, metavar=metavar, default=absent, help=text)


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


def _number_or_name(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


_positive.__name__ = _not_negative.__name__ = "number"  # what argparse calls them
