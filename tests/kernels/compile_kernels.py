"""Compiles every kernel as it is launched, without a GPU: ``python compile_kernels.py 90``.

Launches are recorded instead of made, and Triton itself turns their arguments into what it
compiles. Prints one JSON object a kernel: its name and use, the stack bytes that it spills into and
its shared memory. ``python compile_kernels.py reuse`` prints by kernel which arguments of varied
calls Triton would compile it again for, though the `Specialization` is the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fierpatch.hot_set import HotSet
from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from fierpatch.kernels import (
    append,
    attention,
    block_masses,
    launch,
    project,
    residency,
    retrieve,
)
from fierpatch.kernels import shape as sizes
from fierpatch.kernels.logits import Logits
from fierpatch.rows import split
from kernels.tensors import LAYOUTS, lay_out

CPU = torch.device("cpu")

Launch = tuple[launch.Specialization, tuple[Any, ...]]


def record() -> list[Launch]:
    """Have what is launched from now on go to the list that is returned."""
    launches: list[Launch] = []

    def launch_later(
        specialization: launch.Specialization, grid: tuple[int, int, int], *arguments: Any
    ) -> None:
        assert len(grid) == 3
        launches.append((specialization, arguments))

    launch.Specialization.launch = launch_later  # type: ignore[method-assign]
    return launches


@cache
def binder_of(kernel: Any, arch: int) -> tuple[Any, Any]:
    """Triton's backend, and its function from arguments to what is compiled for them."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def compiled_for(entry: Launch, arch: int = 90) -> dict[str, tuple[str, Any]]:
    """By argument, its type to Triton and what Triton knows of its value (D: divides by 16)."""
    specialization, arguments = entry
    _, bind = binder_of(specialization._kernel, arch)
    bound, known, _ = bind(*arguments, **specialization._constants)
    names = list(bound)[: len(arguments)]
    return dict(zip(names, known, strict=False))


def decode(
    index: KeyIndex,
    dtype: torch.dtype,
    *,
    has_mask: bool = False,
    softcap: float = 0.0,
    sink_dtype: torch.dtype | None = None,
    per_query_head: bool = False,
    batch_size: int = 1,
    num_queries: int = 1,
    heads: int = 8,
    groups: int = 4,
    value_head_dim: int = 0,
    capacity: int = 1024,
    length: int = 1024,
    layout: str = "contiguous",
    has_counters: bool = True,
    scale: float = 0.1,
    tiles: int = 128,
    budget: int = 1024,
    refine: int = 0,
    is_offloaded: bool = False,
) -> None:
    """One step of a layer; 128 tiles, so that constants are those of a long context."""
    head_dim, value_head_dim = index.head_dim, value_head_dim or index.head_dim
    lead = (batch_size, heads)

    def zeros(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return lay_out(torch.zeros(*sizes, dtype=dtype), layout)

    sink_logits = None
    if sink_dtype is not None:
        sink_logits = torch.zeros(heads * groups + 1, dtype=sink_dtype)[1:]
    query = zeros(batch_size, heads * groups, num_queries, head_dim)
    key, value = zeros(*lead, num_queries, head_dim), zeros(*lead, num_queries, value_head_dim)
    keys = torch.zeros(*lead, capacity, head_dim, dtype=dtype)
    values = torch.zeros(*lead, capacity, value_head_dim, dtype=dtype)
    paired = torch.zeros(capacity, *lead, head_dim + value_head_dim, dtype=dtype)
    if is_offloaded:
        keys, values = split([paired], head_dim)
    counters = append.new_counters(CPU)
    state = index.allocate(*lead, capacity, CPU)
    append.append(index, key, value, keys, values, state, counters)
    append.append(None, key, value, keys, values, [], counters)
    append.index_range(index, keys, state, length // 2, length)
    shape = sizes.Shape(
        index, *lead, groups, num_queries, tiles, budget, per_query_head, refine=refine
    )
    scratch = sizes.Scratch(shape, CPU)
    visible = None
    if has_mask:
        visible = zeros(batch_size, 1, num_queries, length, dtype=torch.bool)
    logits = Logits(scale, softcap)
    token_indices = retrieve.retrieve(
        shape, scratch, query, state, counters, logits, visible,
        sinks=length % 5, recent=length % 17, sink_logits=sink_logits, keys=keys,
    )  # fmt: skip
    hot = None
    if is_offloaded and num_queries == 1:
        lists = (batch_size, token_indices.shape[1], head_dim + value_head_dim)
        hot = HotSet.empty(2 * token_indices.shape[3], capacity, *lists, paired)
        weight = zeros(query.shape[1] * head_dim, 24 + 8 * head_dim)
        source = zeros(batch_size, 1, weight.shape[1])
        room = counters.clone()
        _, end = residency.lengths_ahead(hot, token_indices.shape[3], counters, room, shortest=1)
        bias = weight[:, 0] if has_counters else None
        project.project(source, weight, bias, None if has_mask else end)
        more = residency.place(hot, token_indices, end)
        residency.fetch(hot, more, token_indices, end, paired)
    attention.gather_attention(
        query, keys, values, token_indices, scale=scale, softcap=softcap,
        sink_logits=sink_logits, counters=counters if has_counters else None, hot=hot,
    )  # fmt: skip
    # Of a prompt as many queries, which see what there is.
    block_masses.block_masses(
        query, keys, torch.full((num_queries,), length - 1), logits,
        None if visible is None else zeros(batch_size, 1, num_queries, capacity, dtype=torch.bool),
        key_block=64,
    )  # fmt: skip


def launches_of(arch: int) -> Iterator[tuple[str, Launch]]:
    """Every kernel once with each set of constants, by a name that says which."""
    launches = record()
    for module in (append, attention, residency, retrieve):
        module.can_start_early = lambda device: arch >= 90  # type: ignore[assignment]
    bf16 = torch.bfloat16
    attend, score_rotated = "gather_attention_kernel", "rotated_scores_kernel"
    score_fier = "fier_scores_kernel"
    hot = ("append_kernel", "query_kernel", score_rotated, score_fier, attend)
    masked = {"has_mask": True}
    capped = {"softcap": 30.0, "sink_dtype": torch.float32}
    steps: list[tuple[KeyIndex, torch.dtype, dict[str, Any], tuple[str, ...]]] = []
    for index in (RotatedIndex(128), RotatedIndex(128, bits=2), FierIndex(128)):
        steps += [(index, bf16, {}, ()), (index, bf16, masked, ())]
    coded = [RotatedIndex(128, refine_bits=bits) for bits in ((2, 4) if arch == 90 else (4,))]
    for index in (*coded, RotatedIndex(128)):
        steps.append((index, bf16, {"refine": 4}, ()))
    # Lists of candidates that one program does not hold at once.
    steps.append((coded[-1], bf16, {"refine": 4, "budget": 2048}, ("refine_kernel",)))
    steps += [(RotatedIndex(128), bf16, {"is_offloaded": True}, ())]
    # So few tokens that a program of the selection reads smaller blocks.
    steps.append((RotatedIndex(128), bf16, {"tiles": 32}, ()))
    if arch == 90:
        for head_dim in (64, 256):
            for index in (RotatedIndex(head_dim, bits=2), FierIndex(head_dim)):
                steps.append((index, bf16, {}, hot))
        scoring = ("code_scores_kernel", "key_scores_kernel")
        for other in (torch.float32, torch.float16):
            steps.append((RotatedIndex(128), other, {"refine": 4}, scoring))
            steps.append((RotatedIndex(128), other, {}, (attend,)))
        steps.append((RotatedIndex(128), bf16, capped, (score_rotated, "key_kernel", attend)))
        steps.append((FierIndex(128), bf16, capped, (score_fier,)))
    seen = set()
    for index, dtype, options, only in steps:
        launches.clear()
        decode(index, dtype, **options)
        for entry in launches:
            specialization = entry[0]
            name, constants = specialization._kernel.__name__, specialization._constants
            types = tuple(str(known) for known in compiled_for(entry, arch).values())
            key = (name, types, *constants.items(), specialization.num_warps)
            if key in seen or (only and name not in only):
                continue
            seen.add(key)
            kind = f"{index.bits}bit" if isinstance(index, RotatedIndex) else "fier"
            if name == "append_kernel" and constants["INDEX"] == 0:
                kind = "store"
            flags = [
                flag
                for flag in ("mask", "cap", "sink", "codes")
                if constants.get(f"HAS_{flag.upper()}")
            ]
            flags += ["coarse"] if constants.get("IS_COARSE") else []
            flags += [
                f"{flag.lower()} {constants[flag]}"
                for flag in (
                    "PAIR",
                    "HAS_HOT",
                    "IS_PREFETCH",
                    "REFINE",
                    "BLOCK",
                    "PIECES",
                    "CHUNKS",
                    "SPLITS",
                )
                if constants.get(flag)
            ]
            yield " ".join((name, kind, str(index.head_dim), str(dtype)[6:], *flags)), entry


def source_of(entry: Launch, arch: int) -> tuple[Any, dict[str, Any]]:
    """What Triton compiles at this launch, and the options it does so with."""
    specialization, arguments = entry
    kernel, constants = specialization._kernel, specialization._constants
    backend, bind = binder_of(kernel, arch)
    chosen = {"num_warps": specialization.num_warps, "num_stages": specialization.num_stages}
    bound, known, named = bind(*arguments, **constants, **chosen)
    options, signature, values, attributes = kernel._pack_args(backend, named, bound, known, named)
    return ASTSource(kernel, signature, values, attributes), options.__dict__


def stack_bytes(cubin: bytes) -> int:
    """What a thread keeps in local memory, where registers spill to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def varied_calls() -> Iterator[dict[str, Any]]:
    """Calls that differ in what a kernel is compiled for, each with several that do not.

    Lengths, strides, addresses and factors are all of what Triton would treat apart: 1, divisible
    by 16 or not, and whole numbers as factors.
    """
    indexes = (
        RotatedIndex(64),
        RotatedIndex(64, bits=2, group_size=32),
        FierIndex(64),
        RotatedIndex(64, refine_bits=3),
    )
    builds = product(
        indexes,
        (torch.bfloat16, torch.float32),
        (False, True),  # mask
        (0.0, 30.0),  # softcap
        (None, torch.float32, torch.bfloat16),  # sinks
        (False, True),  # a list by query head
    )
    for place, (index, dtype, has_mask, softcap, sink_dtype, per_query_head) in enumerate(builds):
        build = {
            "index": index,
            "dtype": dtype,
            "has_mask": has_mask,
            "sink_dtype": sink_dtype,
            "per_query_head": per_query_head,
            "has_counters": place % 5 != 0,
            "value_head_dim": (0, 5, 48)[place % 3],
            "groups": (4, 1, 3)[place % 7 % 3],
            "refine": 2 if index.refined_bytes_per_token else place % 2 * 4,
            "is_offloaded": place % 3 == 1 and bool(index.refined_bytes_per_token or not place % 2),
        }
        for other, layout in enumerate(LAYOUTS):
            yield build | {
                "layout": layout,
                "batch_size": 1 + (other + place) % 2,
                "heads": (1, 2)[other // 2],
                "num_queries": (1, 16, 3, 1)[other],
                "capacity": (512, 513, 1024, 16)[other],
                "length": (512, 31, 1000, 16)[other],
                "softcap": softcap and softcap + other,
                "scale": (0.125, 0.1, 0.5, 1.0)[other],
                "tiles": (2, 16, 2, 2)[other],
                "budget": (1024, 60, 60, 1024)[other],
            }


# A value that is none of what Triton treats apart, then all that are.
VALUES = (1000003, 0, 1, 2, 16, 17, 2**31 - 1)


def specialized_integers(entry: Launch) -> list[str]:
    """Integers of a launch whose value changes what Triton compiles."""
    specialization, arguments = entry
    found = []
    for place, argument in enumerate(arguments):
        if type(argument) is not int:
            continue
        parameter = specialization._kernel.params[place]
        wide = (2**31, 2**40) if parameter.annotation_type == "i64" else ()
        known = {
            str(compiled_for((specialization, (*arguments[:place], x, *arguments[place + 1 :]))))
            for x in (*VALUES, *wide)
        }
        if len(known) > 1 or not parameter.do_not_specialize:
            found.append(parameter.name)
    return found


def mistaken_arguments(entries: list[Launch]) -> set[str]:
    """Arguments that launches of one specialization do not give it alike, or not 16-byte aligned.

    Only the first is compiled for; the rest is passed by position and as addresses.
    """
    (specialization, arguments), *_ = entries
    names = [parameter.name for parameter in specialization._kernel.params]
    found = set()
    if names[len(arguments) :] != list(specialization._constants):
        found.add("constants")
    for name, types in compiled_for(entries[0]).items():
        if types[0].startswith("*") and "D" not in types[1]:
            found.add(name)
    first = compiled_for(entries[0])
    for entry in entries:
        found |= {name for name, types in compiled_for(entry).items() if types != first[name]}
        for name, argument, other in zip(names, arguments, entry[1], strict=False):
            if kind_of(argument) != kind_of(other):
                found.add(name)
    return found


def kind_of(argument: Any) -> str:
    return str(argument.dtype) if isinstance(argument, Tensor) else type(argument).__name__


def print_stacks(arch: int) -> None:
    for name, entry in launches_of(arch):
        result: dict[str, Any] = {"name": name}
        try:
            source, options = source_of(entry, arch)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            result["stack"] = stack_bytes(compiled.asm["cubin"])
            result["shared"] = compiled.metadata.shared
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(result), flush=True)


def print_reuse() -> None:
    launches = record()
    by_specialization: dict[launch.Specialization, list[Launch]] = defaultdict(list)
    for call in varied_calls():
        launches.clear()
        decode(**call)
        for entry in launches:
            by_specialization[entry[0]].append(entry)
    results: dict[str, dict[str, Any]] = {}
    for specialization, entries in by_specialization.items():
        result = results.setdefault(
            specialization._kernel.__name__, {"shared": 0, "mistaken": set(), "integers": set()}
        )
        result["shared"] += len(entries) > 1
        result["mistaken"] |= mistaken_arguments(entries)
        result["integers"] |= set(specialized_integers(entries[0]))
    for name, result in results.items():
        lists = {key: sorted(x) for key, x in result.items() if isinstance(x, set)}
        print(json.dumps({"name": name, **result, **lists}))


if __name__ == "__main__":
    if sys.argv[1] == "reuse":
        print_reuse()
    else:
        print_stacks(int(sys.argv[1]))
