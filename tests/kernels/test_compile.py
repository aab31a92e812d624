"""Every kernel compiles for a GPU, without one, as it is launched; the hot ones do not spill.

The interpreter accepts what the compiler rejects, and neither runs beside the other, so the
compiler has a process of its own: see `compile_kernels.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# Stack bytes a thread by architecture, where registers spill to, of launches whose names begin so;
# 0 for all others with 128 channels in bfloat16.
ALLOWED_STACK = {
    # Without an index, as for a dense layer: 64-bit strides and addresses around little work.
    80: {
        "append_kernel store 128 bfloat16": 24,
        # The rows that were missing stay at hand to its end.
        "gather_attention_kernel 1bit 128 bfloat16 pair 256": 8,
    },
    90: {
        "append_kernel store 128 bfloat16": 8,
        # As above.
        "gather_attention_kernel 1bit 128 bfloat16 pair 256": 8,
        # The compiler has 96 registers where 128 were enough.
        "key_kernel 1bit 128 bfloat16": 8,
        # All logits of a tile are alive at once, and eight heads are scored even for four.
        "fier_scores_kernel fier 128 bfloat16": 16,
    },
}
HOT = {  # what a step of an index launches, at the least, and its prefill
    "append_kernel",
    "query_kernel",
    "rotated_scores_kernel",
    "fier_scores_kernel",
    "key_kernel",
    "low_kernel",
    "compact_kernel",
    "code_scores_kernel",
    "key_scores_kernel",
    "refine_kernel",
    "lengths_kernel",
    "place_kernel",
    "project_kernel",
    "gather_attention_kernel",
    "block_masses_kernel",
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
    assert len({result["name"] for result in results}) == len(results)
    return {result.pop("name"): result for result in results}


def allowed_stack(name: str, arch: int) -> int:
    return max((x for start, x in ALLOWED_STACK[arch].items() if name.startswith(start)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_the_hot_ones_keep_to_registers(arch: int) -> None:
    results = results_of(str(arch))
    assert {name: x["error"] for name, x in results.items() if "error" in x} == {}
    shared = {name: x["shared"] for name, x in results.items()}
    assert {name: x for name, x in shared.items() if x > SHARED_MEMORY[arch]} == {}
    stacks = {name: x["stack"] for name, x in results.items() if "128 bfloat16" in name}
    assert {name.split()[0] for name in stacks} >= HOT
    if version("triton").startswith("3.6."):  # each version allocates registers its own way
        assert {name: x for name, x in stacks.items() if x > allowed_stack(name, arch)} == {}


@pytest.fixture(scope="module")
def reused() -> dict[str, dict[str, Any]]:
    return results_of("reuse")


def test_a_specialization_decides_every_type_of_its_launches(
    reused: dict[str, dict[str, Any]],
) -> None:
    """It is compiled for its first launch; the next pass addresses, whatever lies there."""
    assert reused.keys() == {*HOT, "index_kernel", "fetch_kernel"}
    assert all(x["shared"] >= 2 for x in reused.values())
    assert {name: x["mistaken"] for name, x in reused.items() if x["mistaken"]} == {}


def test_no_kernel_is_compiled_for_the_value_of_an_integer(
    reused: dict[str, dict[str, Any]],
) -> None:
    """Triton compiles in that a stride is 1, or a multiple of 16, unless told not to."""
    assert {name: x["integers"] for name, x in reused.items() if x["integers"]} == {}
