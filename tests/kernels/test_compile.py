"""Every kernel compiles for a GPU, without one, as it is launched; the hot ones do not spill.

The interpreter accepts what the compiler rejects, and neither runs beside the other, so the
compiler has a process of its own: see `compile_kernels.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Stack bytes a thread, where registers spill to, of launches whose names begin so; 0 for all others
# with 128 channels in bfloat16.
ALLOWED_STACK = {
    # Two words of planes for each of 32 rows are alive at once; one program a KV head and step.
    "append_kernel 2bit 128 bfloat16": 32,
    # Without an index, as for a dense layer: 64-bit strides and addresses around little work.
    "append_kernel store 128 bfloat16": 32,
    "select_kernel": 8,  # an address that is not needed until the end
}
HOT = {  # what a step of an index launches, at the least
    "append_kernel",
    "rotate_query_kernel",
    "rotated_scores_kernel",
    "fier_scores_kernel",
    "gather_attention_kernel",
}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have (CUDA C++ guide, 17.3)


def results_of(what: str) -> dict[str, dict[str, Any]]:
    """What `compile_kernels.py` says of each kernel."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), what],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results
    return {result.pop("name"): result for result in results}


def allowed_stack(name: str) -> int:
    return max((x for start, x in ALLOWED_STACK.items() if name.startswith(start)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_the_hot_ones_keep_to_registers(arch: int) -> None:
    results = results_of(str(arch))
    assert {name: x["error"] for name, x in results.items() if "error" in x} == {}
    shared = {name: x["shared"] for name, x in results.items()}
    assert {name: x for name, x in shared.items() if x > SHARED_MEMORY[arch]} == {}
    stacks = {name: x["stack"] for name, x in results.items() if "128 bfloat16" in name}
    assert {name: x for name, x in stacks.items() if x > allowed_stack(name)} == {}
    assert {name.split()[0] for name in stacks} >= HOT


def test_a_compiled_kernel_is_not_used_for_integers_it_was_not_compiled_for() -> None:
    """Triton compiles in that a stride is 1, or a multiple of 16, unless told not to."""
    mistaken = {name: x["mistaken"] for name, x in results_of("reuse").items()}
    assert {name: x for name, x in mistaken.items() if x} == {}
