"""A specialization compiles once a device, and then launches what was compiled."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fierpatch.kernels import launch

GRID = (2, 3, 1)
CONSTANTS = {"A": 7, "B": True}


class Compiled:
    """What Triton returns from a first launch; remembers the launches that follow."""

    def __init__(self) -> None:
        self.runs: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.runs.append((grid, arguments))


class Kernel:
    """Stands for a ``triton.jit`` function; remembers what it is asked to compile."""

    def __init__(self) -> None:
        self.arg_names = ["pointer", "number", *CONSTANTS]
        self.first: list[Any] = []
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_launch(*arguments: Any, **named: Any) -> Compiled:
            self.first.append((grid, arguments, named))
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return compile_and_launch


class Device:
    """The current device, and those that launches switched to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: int | None = None
        self.entered: list[int] = []
        monkeypatch.setattr(launch, "is_interpreted", False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.enter)

    def enter(self, index: int) -> Any:
        self.entered.append(index)
        return nullcontext()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def specialization(kernel: Kernel) -> launch.Specialization:
    # In another order than the kernel's, which is the one that counts.
    constants = dict(reversed(CONSTANTS.items()))
    return launch.Specialization(kernel, constants, num_warps=4, num_stages=1)


def test_launches_after_the_first_pass_everything_by_position(
    device: Device, kernel: Kernel, specialization: launch.Specialization
) -> None:
    tensors = [torch.zeros(4) for _ in range(3)]
    for tensor in tensors:
        specialization.launch(GRID, tensor, None, 5, 0.5)
    named = {**CONSTANTS, "num_warps": 4, "num_stages": 1}
    assert kernel.first == [(GRID, (tensors[0], None, 5, 0.5), named)]
    assert kernel.compiled[0].runs == [
        (GRID, (tensor, None, 5, 0.5, 7, True)) for tensor in tensors[1:]
    ]


def test_an_empty_grid_launches_nothing(
    device: Device, kernel: Kernel, specialization: launch.Specialization
) -> None:
    specialization.launch((2, 0, 1), torch.zeros(4))
    assert kernel.first == []


def test_every_device_has_what_is_compiled_for_it(
    device: Device, kernel: Kernel, specialization: launch.Specialization
) -> None:
    """Of the first argument's device, current or not."""
    places = [SimpleNamespace(device=SimpleNamespace(index=index)) for index in (0, 1)]
    device.current = 0
    for place in (*places, *places):
        specialization.launch(GRID, place)
    assert [arguments for _, arguments, _ in kernel.first] == [(places[0],), (places[1],)]
    assert [len(compiled.runs) for compiled in kernel.compiled] == [1, 1]
    assert [compiled.runs[0][1][0] for compiled in kernel.compiled] == places
    assert device.entered == [1, 1]


@pytest.mark.parametrize("offset", range(9))
def test_only_tensors_at_other_addresses_than_multiples_of_16_are_copied(offset: int) -> None:
    tensor = torch.arange(20.0)[offset:]
    same = launch.aligned(tensor)
    assert (same is tensor) == (offset % 4 == 0)
    assert same.data_ptr() % 16 == 0
    assert torch.equal(same, tensor)
