"""Which backend runs a layer."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from fierpatch.config import FierConfig
from fierpatch.errors import BackendError, MissingDependencyError

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 256


def choose_backend(config: FierConfig, key: Tensor, value: Tensor) -> str:
    """Which backend runs a layer with such keys and values: ``"reference"`` or ``"triton"``.

    ``"auto"`` is Triton on a CUDA device where it is installed and has kernels for these keys, and
    so is ``"flex"``, of all but the attention.

    Raises:
        BackendError: ``"triton"`` was asked for and cannot run.
        MissingDependencyError: or is not installed.
    """
    if config.backend == "reference":
        return "reference"
    is_asked = config.backend == "triton"
    if not is_asked and key.device.type != "cuda":
        return "reference"
    if find_spec("triton") is None:
        if is_asked:
            raise MissingDependencyError(
                'backend="triton" needs the package triton, which is not installed: pip install '
                'fierpatch[triton], or use backend="reference"'
            )
        return "reference"
    head_dim = max(key.shape[3], value.shape[3])
    problem = ""
    if key.dtype not in _KERNEL_DTYPES:
        problem = f"keys of {key.dtype}: it has kernels for bfloat16, float16 and float32"
    elif value.dtype != key.dtype:
        problem = f"keys of {key.dtype} and values of {value.dtype}: it wants one dtype"
    elif head_dim > _MAX_HEAD_DIM:
        problem = f"a head_dim of {head_dim}: its kernels end at {_MAX_HEAD_DIM}"
    if problem and is_asked:
        raise BackendError(f'backend="triton" cannot run on {problem}; use backend="reference"')
    return "reference" if problem else "triton"
