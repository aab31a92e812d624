"""The ``fierpatch`` command."""

from __future__ import annotations

import io
import os
import sys

from fierpatch.cli.options import make_parser
from fierpatch.errors import FierError

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None means those of the process.

    Returns:
        The exit status: 0; 1 for an error; 2 for a wrong command line; 130 when interrupted.
    """
    try:
        arguments = make_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may say what the terminal's encoding cannot.
        sys.stdout.reconfigure(errors="replace")
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
