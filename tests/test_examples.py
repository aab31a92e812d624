"""The examples run as they are, and the loops in them decode what generate does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The example of a loop of one's own, in a process of its own."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "examples/compiled_loop.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("mode", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_loop_of_ones_own_decodes_the_tokens_of_generate(mode: str) -> None:
    result = run("--device", "cpu", "--mode", mode, "--tokens", "8")
    assert result.returncode == 0, result.stdout + result.stderr
    tokens, speed, verdict = result.stdout.splitlines()
    assert len(tokens.split()) == 1 + 8
    assert speed.startswith(f"{mode}: ")
    assert verdict == "the tokens of model.generate"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compile", "graph"])
def test_a_loop_of_ones_own_decodes_the_tokens_of_generate_on_cuda(mode: str) -> None:
    result = run("--device", "cuda", "--mode", mode, "--tokens", "40")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the tokens of model.generate" in result.stdout.splitlines()


def test_capture_without_cuda_says_what_to_do() -> None:
    result = run("--device", "cpu", "--mode", "graph")
    assert result.returncode == 2
    assert "choose --device cuda" in result.stderr
