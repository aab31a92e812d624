"""Launching kernels: what is compiled is kept, so that a launch costs one dictionary lookup.

Triton's own launch path inspects every argument each time, which at one query a step costs more
than the kernels take. Here a kernel is specialised on dtypes and constants alone: every pointer is
16-byte aligned (`aligned` sees to it) and no integer is specialised.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fierpatch.errors import BackendError

Constants = tuple[tuple[str, Any], ...]

is_interpreted: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors, as tests ask for."""


class Launcher:
    """One kernel and what has been compiled of it.

    Args:
        kernel: a ``triton.jit`` function. Its constants come last and no integer argument of it is
            specialised.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        *arguments: Any,
        constants: Constants,
        num_warps: int,
        num_stages: int = 2,
    ) -> None:
        """Launch on the current stream of the first argument's device.

        Args:
            grid: programs along the three axes; nothing happens if one is 0.
            *arguments: tensors (or None) and numbers, in the kernel's order.
            constants: the kernel's constants in its order.
            num_warps, num_stages: as Triton means them.
        """
        if 0 in grid:
            return
        if is_interpreted:
            self.kernel[grid](*arguments, **dict(constants))
            return
        device = arguments[0].device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, arguments, constants, num_warps, num_stages)
        else:
            self._launch(grid, arguments, constants, num_warps, num_stages)

    def _launch(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: Constants,
        num_warps: int,
        num_stages: int,
    ) -> None:
        types = [a.dtype if isinstance(a, Tensor) else type(a) for a in arguments]
        key = (constants, num_warps, torch.cuda.current_device(), *types)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *[value for _, value in constants])
            return
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self._compiled[key] = self.kernel[grid](*arguments, **dict(constants), **options)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself if its first element is 16-byte aligned, else a copy that is."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def check_device(device: torch.device) -> None:
    """Check that kernels can run on tensors of this device.

    Raises:
        BackendError: they cannot.
    """
    if is_interpreted:
        if device.type != "cpu":
            raise BackendError(
                f"TRITON_INTERPRET is set, which runs kernels on CPU tensors, and the tensors are "
                f"on {device}: unset it, or move the model to the CPU"
            )
    elif device.type != "cuda":
        raise BackendError(
            f'backend="triton" needs tensors on a CUDA device and got {device}: move the model to '
            'one, or use backend="reference"'
        )
