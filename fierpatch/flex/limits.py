"""What FlexAttention cannot do, said before it is asked, with the way round.

Read off torch 2.11 to 2.13: ``torch/_inductor/kernel/flex``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch.errors import BackendError, ShapeError

_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_HEAD_DIM = 16  # of a tl.dot
MOST_HEAD_DIM = 256  # beyond it a tile of keys and values leaves no shared memory
MOST_ROWS = 127  # queries of a head that the decode kernel takes; more are the prefill kernel's


def check_layer(key: Tensor, value: Tensor, *, is_compiled: bool) -> None:
    """Check whether FlexAttention has a kernel for a layer with such keys and values.

    Args:
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, Dv]``.
        is_compiled: the model will be compiled, on a CPU too.

    Raises:
        BackendError: it has none.
    """
    device = key.device.type
    rest = 'use backend="auto" or "reference"'
    if device not in ("cpu", "cuda"):
        raise BackendError(f'backend="flex" runs on CUDA and on CPUs, and this is {device}: {rest}')
    if key.dtype != value.dtype:
        raise BackendError(
            f'backend="flex" cannot run on keys of {key.dtype} and values of {value.dtype}: it '
            f"wants one dtype; {rest}"
        )
    vectors = torch.backends.cpu.get_cpu_capability()
    if device == "cpu" and is_compiled and not vectors.startswith("AVX"):
        raise BackendError(
            'backend="flex" cannot be compiled here: FlexAttention wants a CPU with AVX2, and this '
            f"has {vectors}: leave compile=False, or {rest}"
        )
    is_eager = device == "cpu" and not is_compiled
    if key.dtype not in (*_FUSED_DTYPES, *((torch.float64,) if is_eager else ())):
        where = "on CUDA" if device == "cuda" else "compiled on a CPU"
        raise BackendError(
            f'backend="flex" cannot run on keys of {key.dtype}: FlexAttention takes bfloat16, '
            f"float16 and float32 {where}; {rest}"
        )
    if device == "cuda":
        check_head_dims('backend="flex"', key, value, remedy=rest)


def check_head_dims(option: str, keys: Tensor, values: Tensor, *, remedy: str) -> None:
    """Check that FlexAttention has a kernel for these keys and values on CUDA.

    Args:
        option: what asks for it, for the message.
        keys, values: ``[B, H, S, D]`` and ``[B, H, S, Dv]``.
        remedy: what to do instead, for the message.

    Raises:
        BackendError: it has none.
    """
    for name, size in (("keys", keys.shape[3]), ("values", values.shape[3])):
        if not LEAST_HEAD_DIM <= size <= MOST_HEAD_DIM:
            raise BackendError(
                f"{option} cannot run on {name} of head_dim {size}: FlexAttention takes "
                f"{LEAST_HEAD_DIM} to {MOST_HEAD_DIM} on CUDA; {remedy}"
            )


def check_tensors(query: Tensor, keys: Tensor, values: Tensor, token_indices: Tensor) -> None:
    """Check that the tensors of one attention fit each other.

    Args:
        query: ``[B, Hq, T, D]``.
        keys, values: ``[B, H, S, D]`` and ``[B, H, S, Dv]``.
        token_indices: ``[B, H or Hq, T, K]``.

    Raises:
        ShapeError: they do not.
    """
    shapes = [tuple(each.shape) for each in (query, keys, values, token_indices)]
    if any(len(shape) != 4 for shape in shapes):
        raise ShapeError(f"query, keys, values and token_indices of {shapes}: want 4 axes each")
    batch_size, num_query_heads, num_queries, head_dim = shapes[0]
    num_kv_heads = shapes[1][1]
    if (
        shapes[1][:3] != shapes[2][:3]
        or shapes[1][0] != batch_size
        or shapes[1][3] != head_dim
        or num_query_heads % num_kv_heads
    ):
        raise ShapeError(
            f"query {shapes[0]}, keys {shapes[1]} and values {shapes[2]} do not fit each other: "
            "want [B, a multiple of H, T, D], [B, H, S, D] and [B, H, S, Dv]"
        )
    lists = shapes[3]
    if lists[1] not in (num_kv_heads, num_query_heads) or lists[::2] != (batch_size, num_queries):
        raise ShapeError(
            f"token_indices {lists} do not fit query {shapes[0]} and keys {shapes[1]}: want "
            f"[{batch_size}, {num_kv_heads} or {num_query_heads}, {num_queries}, K]"
        )


def can_fuse(like: Tensor) -> bool:
    """Whether what makes a mask may be compiled with the attention that reads it.

    On CUDA, where it becomes a few kernels instead of some thirty. On a CPU such a graph does not
    compile (torch 2.13), so there it has to be hidden in an operator, as it is where nothing is
    compiled but the attention.
    """
    return like.is_cuda and torch.compiler.is_compiling()


def check_rows(num_rows: int, *, mode: str, is_cuda: bool) -> None:
    """Check the query length that FlexAttention will see.

    Raises:
        BackendError: the decode kernel on CUDA takes fewer.
    """
    if is_cuda and num_rows > MOST_ROWS:
        remedy = 'use mode="compact", which folds the query heads alone'
        raise BackendError(
            f"{num_rows} query heads and queries share a KV head, and FlexAttention's decode "
            f"kernel takes {MOST_ROWS}: "
            + (remedy if mode == "mask" else 'use backend="triton" or "reference"')
        )


def check_lse(*, is_cuda: bool, is_compiling: bool) -> None:
    """Check whether FlexAttention gives the log-sum-exp here.

    Raises:
        BackendError: compiled on a CPU it does not.
    """
    if is_compiling and not is_cuda:
        raise BackendError(
            "FlexAttention gives no log-sum-exp where it is compiled on a CPU, which with_lse=True "
            'and sink logits in mode="mask" need: use mode="compact" for sink logits, or call it '
            "uncompiled"
        )
