"""Every test of a kernel passes in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

FILES = sorted(
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if path.name not in ("test_interpreter.py", "test_compile.py")
)


@pytest.mark.slow
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the process already interprets")
@pytest.mark.parametrize("name", FILES)
def test_kernels_pass_when_interpreted(name: str, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTEST_")  # those of this process and its test workers
    }
    environment |= {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    profile = f"--hypothesis-profile={settings.get_current_profile_name()}"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", profile]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(name))],
        cwd=pytestconfig.rootpath,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        pytest.fail(done.stdout, pytrace=False)
