"""Compiles every kernel as it is launched, without a GPU: ``python compile_kernels.py 90``.

Launches are recorded instead of made, so signatures, constants and warps are those of the code that
launches. Prints one JSON object a kernel: its name and use, the stack bytes that it spills into and
its shared memory. ``python compile_kernels.py reuse`` prints which integers of a launch a compiled
kernel that is used again would take for others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from fierpatch.kernels import append, attention, launch, retrieve

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.bool: "*i1",
}

launch_one = launch.Launcher.__call__

Launch = tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]


class Compiler:
    """Stands for a kernel, and remembers what a launcher has Triton compile."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return self.compile

    def compile(self, *arguments: Any, **named: Any) -> Any:
        names = {parameter.name for parameter in self.kernel.params}
        constants = {name: x for name, x in named.items() if name in names}
        options = {name: x for name, x in named.items() if name not in names}
        self.launches.append((self.kernel, arguments, constants, options))
        return defaultdict(lambda: lambda *arguments: None)  # by grid, what launches


def record() -> list[Launch]:
    """Have what launchers compile from now on go to the list that is returned."""
    launches: list[Launch] = []
    call = launch.Launcher.__call__

    def launch_later(launcher: launch.Launcher, *arguments: Any, **options: Any) -> None:
        compiler = Compiler(launcher.kernel)
        call(launch.Launcher(compiler), *arguments, **options)
        launches.extend(compiler.launches)

    launch.Launcher.__call__ = launch_later  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: None  # type: ignore[assignment, return-value]
    return launches


def decode(index: KeyIndex, dtype: torch.dtype, has_mask: bool, is_capped: bool) -> None:
    """One step of a layer of 8 KV heads with 4 query heads each, capped and with sinks or not."""
    softcap = 30.0 if is_capped else 0.0
    sink_logits = torch.zeros(32) if is_capped else None
    head_dim, capacity = index.head_dim, 1024
    device = torch.device("cpu")
    query = torch.zeros(1, 32, 1, head_dim, dtype=dtype)
    key, keys = query[:, :8], torch.zeros(1, 8, capacity, head_dim, dtype=dtype)
    counters = append.new_counters(device)
    state = index.allocate(1, 8, capacity, device)
    append.append(index, key, key, keys, keys, state, counters)
    append.append(None, key, key, keys, keys, [], counters)
    append.index_range(index, keys, state, 0, capacity)
    # 128 tiles, so that constants are those of a long context.
    shape = retrieve.Shape(index, 1, 8, 4, 1, 128, 1024, False)
    scratch = retrieve.Scratch(shape, device)
    visible = torch.ones(1, 1, 1, capacity, dtype=torch.bool) if has_mask else None
    retrieve.score(shape, scratch, query, state, counters, retrieve.Logits(0.1, softcap), visible)
    arrivals = torch.zeros(shape.rows, dtype=torch.int32)
    token_indices = retrieve.select(
        shape, scratch, counters, sinks=4, recent=16, sink_logits=sink_logits,
        has_mask=has_mask,
    )  # fmt: skip
    attention.gather_attention(
        query, keys, keys, token_indices, scale=0.1, softcap=softcap,
        sink_logits=sink_logits, counters=counters, arrivals=arrivals,
    )  # fmt: skip


def launches_of(arch: int) -> Iterator[tuple[str, Launch]]:
    """Every kernel once with each set of constants, by a name that says which."""
    launches = record()
    dtype = torch.bfloat16
    attend, score_rotated = "gather_attention_kernel", "rotated_scores_kernel"
    score_fier = "fier_scores_kernel"
    hot = ("append_kernel", "rotate_query_kernel", score_rotated, score_fier, attend)
    steps: list[tuple[KeyIndex, torch.dtype, bool, bool, tuple[str, ...]]] = []
    for index in (RotatedIndex(128), RotatedIndex(128, bits=2), FierIndex(128)):
        steps += [(index, dtype, False, False, ()), (index, dtype, True, False, ())]
    if arch == 90:
        for head_dim in (64, 256):
            for index in (RotatedIndex(head_dim, bits=2), FierIndex(head_dim)):
                steps.append((index, dtype, False, False, hot))
        for other in (torch.float32, torch.float16):
            steps.append((RotatedIndex(128), other, True, False, (attend,)))
        capped = (score_rotated, "select_kernel", "priority_kernel", attend)
        steps.append((RotatedIndex(128), dtype, False, True, capped))
        steps.append((FierIndex(128), dtype, False, True, (score_fier,)))
    seen = set()
    for index, dtype, has_mask, is_capped, only in steps:
        launches.clear()
        for can_cooperate in (False, True):
            retrieve.can_cooperate = lambda *sizes, can=can_cooperate: can
            decode(index, dtype, has_mask, is_capped)
        for entry in launches:
            kernel, arguments, constants, options = entry
            name = kernel.__name__
            types = tuple(a.dtype if isinstance(a, Tensor) else type(a) for a in arguments)
            key = (name, types, *constants.items(), *options.items())
            if key in seen or (only and name not in only):
                continue
            seen.add(key)
            kind = f"{index.bits}bit" if isinstance(index, RotatedIndex) else "fier"
            if name == "append_kernel" and constants["INDEX"] == 0:
                kind = "store"
            flags = [
                flag for flag in ("mask", "cap", "sink") if constants.get(f"HAS_{flag.upper()}")
            ]
            if "PHASE" in constants:
                flags.append(f"phase {constants['PHASE']}")
            yield " ".join((name, kind, str(index.head_dim), str(dtype)[6:], *flags)), entry


def source_of(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """Triton's source of one launch, as `Launcher` has it specialised."""
    signature: dict[str, str] = {}
    known = dict(constants)
    for parameter, argument in zip(kernel.params, arguments, strict=False):
        name = parameter.name
        if argument is None:
            known[name] = None
        elif isinstance(argument, Tensor):
            signature[name] = POINTERS[argument.dtype]
        elif isinstance(argument, float):
            signature[name] = "fp32"
        else:
            signature[name] = parameter.annotation_type or "i32"
    names = [parameter.name for parameter in kernel.params]
    assert set(names) == signature.keys() | known.keys()
    types = {name: signature.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in known.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name].startswith("*")
    }
    return ASTSource(kernel, types, values, aligned)


def stack_bytes(cubin: bytes) -> int:
    """What a thread keeps in local memory, where registers spill to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def mistaken_integers(entry: Launch) -> list[str]:
    """Integers that Triton compiles in (divisible by 16, or 1) and a launcher does not tell apart.

    Every integer of a launch in turn is 16, then 17 and 1: where Triton specialises on its value,
    the launcher has to compile again.
    """
    kernel, arguments, constants, _ = entry
    mistaken = []
    for place, argument in enumerate(arguments):
        parameter = kernel.params[place]
        if type(argument) is not int or parameter.do_not_specialize:
            continue
        compiler = Compiler(kernel)
        launcher = launch.Launcher(compiler)
        for value in (16, 17, 1):
            changed = (*arguments[:place], value, *arguments[place + 1 :])
            launch_one(
                launcher, (1, 1, 1), *changed, constants=tuple(constants.items()), num_warps=4
            )
        if len(compiler.launches) < 3:
            mistaken.append(parameter.name)
    return mistaken


def print_stacks(arch: int) -> None:
    for name, (kernel, arguments, constants, options) in launches_of(arch):
        result: dict[str, Any] = {"name": name}
        try:
            source = source_of(kernel, arguments, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            result["stack"] = stack_bytes(compiled.asm["cubin"])
            result["shared"] = compiled.metadata.shared
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(result), flush=True)


def print_mistaken() -> None:
    for name, entry in launches_of(90):
        print(json.dumps({"name": name, "mistaken": mistaken_integers(entry)}))


if __name__ == "__main__":
    if sys.argv[1] == "reuse":
        print_mistaken()
    else:
        print_stacks(int(sys.argv[1]))
