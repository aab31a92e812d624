"""The command does what the library does, and says in one line what went wrong."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

import fierpatch
from fierpatch import FierConfig, cli
from fierpatch.cli import commands, options
from fierpatch.errors import DownloadError, FierError
from fierpatch.evaluate import smollm2
from fierpatch.hf.checkpoints import load
from hf.models import MAX_POSITIONS
from hf.tokens import CHAT_TEMPLATE, save_tiny_model

PROMPT = (
    "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line; gives its status and what it printed to both streams."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what the test itself made transformers say
        status = cli.main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


def test_the_version_is_printed(run: Any) -> None:
    assert run("--version") == (0, f"fierpatch {fierpatch.__version__}\n", "")


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["generate"], ["estimate"], ["verify"], ["plot"]]
)
def test_help_is_there(run: Any, command: list[str]) -> None:
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: fierpatch")


@pytest.mark.parametrize("command", ["demo", "generate", "estimate", "verify", "plot"])
def test_every_setting_is_an_option_and_described(run: Any, command: str) -> None:
    _, out, _ = run(command, "--help")
    described = options._described_fields()
    for field in dataclasses.fields(FierConfig):
        assert "--" + field.name.replace("_", "-") in out
        assert len(described[field.name]) > 10


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; from fierpatch.cli import main; status = main(['generate', '--help']);"
        "sys.exit(status or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "fierpatch", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"fierpatch {fierpatch.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["generate"],
        ["generate", "--model", "m"],
        ["generate", "--model", "m", "--prompt", "a", "--prompt-file", "b"],
        ["generate", "--model", "m", "--prompt", "a", "--budget", "many"],
        ["generate", "--model", "m", "--prompt", "a", "--buget", "64"],
        ["generate", "--model", "m", "--prompt", "a", "--max-new-tokens", "0"],
        ["verify", "--model", "m", "--prompt", "a", "--dtype", "int8"],
        ["estimate", "--model", "m"],
        ["estimate", "--model", "m", "--context", "-5"],
        ["plot", "--model", "m", "--prompt", "a"],
        ["plot", "--model", "m", "--prompt", "a", "--layer", "-1"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_told_in_one_line(run: Any, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert_is_one_error(err)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--budget", "3"], "sinks"),
        (["--index", "rotatd"], "'rotated'"),
        (["--index", "fier", "--bits", "2"], "bits=2"),
        (["--offload", "--refine", "4", "--refine-bits", "exact"], "offload"),
        (["--offload", "--hot-tokens", "8"], "hot_tokens"),
        (["--backend", "triton"], "triton"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta:x"], "--device meta:x"),
        (["--chat"], "chat template"),
        (["--max-new-tokens", str(MAX_POSITIONS)], "positions"),
        (["--prompt", ""], "empty"),
        (["--prompt", " \n"], "empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_cannot_apply_is_told_in_one_line(
    run: Any, folder: Path, options: list[str], hint: str
) -> None:
    prompt = [] if "--prompt" in options else ["--prompt", PROMPT]
    status, out, err = run("generate", "--model", folder, *prompt, *options)
    assert (status, out) == (1, "")
    assert_is_one_error(err)
    assert hint in err


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_a_prompt_past_the_positions_is_told_in_one_line(
    run: Any, folder: Path, command: str
) -> None:
    status, out, err = run(command, "--model", folder, "--prompt", "x" * MAX_POSITIONS)
    assert (status, out) == (1, "")
    assert_is_one_error(err)
    assert f"{MAX_POSITIONS} positions" in err


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"caf\xe9 au lait", "byte 3 is 0xe9"),
        (b"\x7fELF\x00\x00", "binary"),
        (None, "No such file"),
        ("folder", "directory"),
    ],
)
def test_a_file_without_text_is_told_in_one_line(
    run: Any, folder: Path, tmp_path: Path, content: object, hint: str
) -> None:
    path = tmp_path / "prompt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    status, out, err = run("verify", "--model", folder, "--prompt-file", path)
    assert (status, out) == (1, "")
    assert_is_one_error(err)
    assert hint in err


@pytest.mark.parametrize("command", ["generate", "verify", "estimate"])
@pytest.mark.parametrize("kind", ["missing", "no config", "no weights", "a file", "a hub id"])
def test_a_model_that_is_not_there_is_told_in_one_line(
    run: Any, tmp_path: Path, command: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    model: object = tmp_path / "model"
    if kind == "a hub id":
        model = "nobody/has-this-model"
    elif kind == "a file":
        (tmp_path / "model").write_text("weights")
    elif kind != "missing":
        (tmp_path / "model").mkdir()
        if kind == "no weights":
            (tmp_path / "model" / "config.json").write_text("{}")
    rest = ["--context", "4096"] if command == "estimate" else ["--prompt", "a"]
    status, out, err = run(command, "--model", model, *rest)
    assert (status, out) == (1, "")
    assert_is_one_error(err)
    assert str(model) in err
    assert "--debug" not in err


def test_a_demo_without_network_is_told_in_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise DownloadError("no network:\ncheck the cable")

    monkeypatch.setattr(smollm2, "fetch", fail)
    status, _, err = run("demo")
    assert (status, err) == (1, "fierpatch: error: no network: check the cable\n")


def test_an_unexpected_error_is_told_in_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> str:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(commands, "_prompt", fail)
    status, out, err = run("generate", "--model", "m", "--prompt", "a")
    assert (status, out) == (1, "")
    assert err == "fierpatch: error: ZeroDivisionError: by zero (--debug shows where)\n"


@pytest.mark.parametrize("arguments", [["--debug", "generate"], ["generate", "--debug"]])
def test_debug_lets_the_error_through(run: Any, arguments: list[str]) -> None:
    with pytest.raises(FierError):
        run(*arguments, "--model", "m", "--prompt", "")


def test_an_interrupt_is_quiet(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(arguments: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_prompt", interrupt)
    assert run("generate", "--model", "m", "--prompt", "a") == (130, "", "")


@pytest.mark.parametrize("source", ["--prompt", "--prompt-file", "-"])
def test_generate_prints_what_the_patched_model_says(
    run: Any, folder: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with fierpatch.apply(model, budget=32, index="fier", dense_layers=1) as handle:
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
        report = str(handle.report())
    text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    options = ["--budget", 32, "--index", "fier", "--dense-layers", 1, "--max-new-tokens", 12]
    if source == "--prompt":
        prompt = ["--prompt", PROMPT]
    else:
        path = tmp_path / "prompt.txt"
        path.write_text(PROMPT, encoding="utf-8-sig")  # a byte order mark is no text
        prompt = ["--prompt-file", path]
    if source == "-":
        prompt = ["--prompt-file", "-"]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    status, out, err = run("generate", "--model", folder, *prompt, *options, "--report")
    assert status == 0
    assert out.rstrip("\n") == text.rstrip("\n")
    assert err == report + "\n"


def test_a_chat_prompt_goes_through_the_template(run: Any, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, chat_template=CHAT_TEMPLATE)
    rest = ["--max-new-tokens", 8]
    chat = run("generate", "--model", folder, "--prompt", "Hello", "--chat", *rest)
    plain = run("generate", "--model", folder, "--prompt", "[Hello]", *rest)
    assert chat == plain
    assert plain[0] == 0


def test_estimate_prints_the_table(run: Any, folder: Path) -> None:
    model, _ = load(folder)
    wanted = fierpatch.estimate(model, 1000, 3, dtype=torch.float16, budget=64, bits=2)
    options = ["--batch", 3, "--dtype", "float16", "--budget", 64, "--bits", 2]
    printed = run("estimate", "--model", folder, "--context", 1000, *options)
    assert printed == (0, f"{wanted}\n", "")


def test_estimate_needs_no_weights(run: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    both = [run("estimate", "--model", path, "--context", 1000) for path in (folder, tmp_path)]
    assert both[0] == both[1]
    assert both[0][0] == 0


def test_verify_prints_the_verification(run: Any, folder: Path) -> None:
    model, tokenizer = load(folder)
    wanted = fierpatch.verify(model, tokenizer, PROMPT, max_new_tokens=5, budget=40, sinks=2)
    options = ["--max-new-tokens", 5, "--budget", 40, "--sinks", 2]
    printed = run("verify", "--model", folder, "--prompt", PROMPT, *options)
    assert printed == (0, f"{wanted}\n", "")


def test_plot_draws_the_blocks_that_are_attended(run: Any, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "blocks.svg"
    command = ["plot", "--model", folder, "--prompt", PROMPT, "--layer", 3, "--output", path]
    status, out, err = run(*command, "--budget", 64, "--head", 2, "--prefill-mass", 0.3)
    assert (status, err) == (0, "")
    assert out.startswith(f"{path}: ")
    assert out.endswith(f"% of the causal blocks of {len(PROMPT)} tokens\n")
    assert path.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--layer", "0"], "those that do are [2, 3]"),
        (["--layer", "4"], "those that do are [2, 3]"),
        (["--layer", "2", "--head", "99"], "--head 99"),
        (["--layer", "2", "--prefill", "dense"], 'prefill="sparse"'),
        (["--layer", "2", "--output", "blocks.abc"], ".svg"),
        (["--layer", "2", "--output", "no/such/folder.svg"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_picture_that_cannot_be_drawn_is_told_in_one_line(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str],
    hint: str,
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    command = ["plot", "--model", folder, "--prompt", PROMPT, "--budget", 64]
    status, out, err = run(*command, *options)
    assert (status, out) == (1, "")
    assert_is_one_error(err)
    assert hint in err
    assert not list(tmp_path.iterdir())


def test_a_picture_without_matplotlib_is_told_in_one_line(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run("plot", "--model", folder, "--prompt", PROMPT, "--layer", 2)
    assert (status, out) == (1, "")
    assert_is_one_error(err)
    assert "fierpatch[plot]" in err


def test_the_weights_are_of_the_asked_dtype(run: Any, folder: Path) -> None:
    options = ["--max-new-tokens", 4, "--report", "--dtype"]
    held = [
        run("generate", "--model", folder, "--prompt", PROMPT, *options, dtype)[2]
        for dtype in ("float32", "bfloat16")
    ]
    assert "holds 512.0 KiB of KV" in held[0]
    assert "holds 256.0 KiB of KV" in held[1]


def test_the_demo_asks_each_question_thrice(run: Any, tmp_path: Path) -> None:
    """With any model; a random one only gets everything wrong."""
    folder = save_tiny_model(tmp_path, max_position_embeddings=8192)
    status, out, err = run("demo", "--model", folder, "--budget", 64)
    assert (status, err) == (0, "")
    assert out.count("\n  dense ") == 3
    assert out.count("\n  retrieval      64 tokens") == 3
    assert out.count("\n  newest only    64 tokens") == 3
    assert "right, of 3: dense 0, retrieval 0, newest only 0" in out
    assert "of index" in out


def test_a_demo_past_the_positions_is_told_in_one_line(run: Any, folder: Path) -> None:
    status, _, err = run("demo", "--model", folder)
    assert status == 1
    assert_is_one_error(err)
    assert f"{MAX_POSITIONS} positions" in err


def test_what_transformers_says_elsewhere_is_left_as_it_was(run: Any, folder: Path) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    run("generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 2)
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before


def test_a_reader_that_has_gone_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "fierpatch", "estimate", "--model", folder, "--context", "99"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def assert_is_one_error(err: str) -> None:
    assert err.startswith("fierpatch: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
