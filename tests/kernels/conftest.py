"""Kernels run in Triton's interpreter here, which must be asked for before Triton is imported.

PyTorch's compiler imports Triton too, so the interpreter has a process of its own: files that need
it are skipped unless TRITON_INTERPRET is set, and `test_interpreter.py` runs each of them so.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOT_INTERPRETED = ("test_interpreter.py", "test_compile.py")
# The interpreter's own: NumPy's words on lanes that a mask drops later, on the limits of tanh, and
# on loops whose bounds were loaded (NumPy 2.4 makes an error of the last).
WARNINGS = (
    "ignore:overflow encountered in exp2:RuntimeWarning:triton.runtime.interpreter",
    "ignore:invalid value encountered:RuntimeWarning:triton.runtime.interpreter",
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
)
REASON = "needs TRITON_INTERPRET=1 from the start: test_interpreter.py runs this file"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in NOT_INTERPRETED:
            item.add_marker(pytest.mark.skipif(not IS_INTERPRETED, reason=REASON))
            for warning in WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
