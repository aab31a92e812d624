"""What every test stands on: Hypothesis profiles, fixed seeds, and NaN in unwritten memory.

Profiles are `dev` (random, quick), `ci` (the same examples in every run; chosen where the
environment variable CI is set) and `thorough`; choose by ``--hypothesis-profile``.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import register_random, settings

settings.register_profile("dev", deadline=None, max_examples=50, print_blob=True)
settings.register_profile("ci", settings.get_profile("dev"), max_examples=100, derandomize=True)
settings.register_profile("thorough", settings.get_profile("dev"), max_examples=500)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# One thread a process: test processes share the cores, and sums keep one order.
torch.set_num_threads(1)


class TorchRandom:
    """PyTorch's global generator, in the form in which Hypothesis seeds it for every example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # Hypothesis keeps a weak reference
register_random(TORCH_RANDOM)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the cyclic collector, only reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before each test: seed, and have `torch.empty` return memory full of NaN.

    PyTorch fills new memory (NaN, or the largest integer) only in its deterministic mode. On a GPU
    that mode also objects to operators we need, so there it may only warn.
    """
    is_gpu = item.get_closest_marker("gpu") is not None
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=is_gpu)
    torch.manual_seed(0)
