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

is_interpreted: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors, as tests ask for."""


class Specialization:
    """One kernel with all its constants, and what has been compiled of it for each device.

    Made once for everything that a compiled kernel depends on: dtypes and missing tensors too.

    Args:
        kernel: a ``triton.jit`` function. Its constants come last, and no integer argument of it
            is specialised.
        constants: by name, all that the kernel has.
        num_warps, num_stages: as Triton means them.
        is_early: whether it may start beside the kernel before, see `fierpatch.kernels.early`.
    """

    __slots__ = (
        "_compiled", "_constants", "_kernel", "_values", "is_early", "num_stages", "num_warps"
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        constants: dict[str, Any],
        *,
        num_warps: int,
        num_stages: int = 2,
        is_early: bool = False,
    ) -> None:
        self._kernel = kernel
        # A compiled kernel takes them by position.
        names = sorted(constants, key=kernel.arg_names.index)
        self._constants = {name: constants[name] for name in names}
        self._values = tuple(self._constants.values())
        self._compiled: dict[int, Any] = {}
        self.num_warps = num_warps
        self.num_stages = num_stages
        self.is_early = is_early

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream of the first argument's device.

        Args:
            grid: programs along the three axes; nothing happens if one is 0.
            *arguments: tensors (or None) and numbers, in the kernel's order.
        """
        if 0 in grid:
            return
        if is_interpreted:
            self._kernel[grid](*arguments, **self._constants)
            return
        index = arguments[0].device.index
        if index == torch.cuda.current_device():
            self._launch(index, grid, arguments)
        else:
            with torch.cuda.device(index):
                self._launch(index, grid, arguments)

    def _launch(self, index: int, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        compiled = self._compiled.get(index)
        if compiled is None:
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            if self.is_early:
                options["launch_pdl"] = True
            self._compiled[index] = self._kernel[grid](*arguments, **self._constants, **options)
            return
        compiled[grid](*arguments, *self._values)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself if its first element is 16-byte aligned, else a copy that is."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def as_rows(tensor: Tensor) -> Tensor:
    """A 4-D tensor as kernels take it: contiguous in the last dimension, and `aligned`."""
    return aligned(tensor if tensor.stride(3) == 1 else tensor.contiguous())


def as_mask(visible: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """A mask ``[B or 1, 1, T, S]`` as kernels take it, and its strides over B and T."""
    if visible is None:
        return None, (0, 0)
    visible = as_rows(visible)
    return visible, (visible.stride(0) if visible.shape[0] > 1 else 0, visible.stride(2))


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
