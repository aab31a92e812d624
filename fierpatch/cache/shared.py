"""What the layers of one cache have in common, apart from their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fierpatch.config import FierConfig
from fierpatch.index import KeyIndex
from fierpatch.offload import MemoryPool, Transfer
from fierpatch.ops.backend import choose_backend
from fierpatch.ops.operators import Operators
from fierpatch.ops.reference_operators import ReferenceOperators

if TYPE_CHECKING:
    from fierpatch.ops.kernel_operators import Workspace


@dataclass
class Shared:
    """Constant tensors of the index and working memory of kernels, held once a device.

    And the memory of the host, and who copies to it, one layer after the other.
    """

    constants: dict[tuple[KeyIndex, torch.device], list[Tensor]] = field(default_factory=dict)
    workspaces: dict[torch.device, Workspace] = field(default_factory=dict)
    transfer: Transfer = field(default_factory=Transfer)
    memory: MemoryPool = field(default_factory=MemoryPool)
    num_offloaded: int = 0

    def enlist(self) -> int:
        """Count one more offloaded layer, and say the how many-th it is, from 1 on."""
        self.num_offloaded += 1
        return self.num_offloaded

    def check_host(self, nbytes: int) -> None:
        """Check before the first offloaded layer takes so many bytes that all of them can.

        Raises:
            HostMemoryError: the host has too little memory; nothing was taken.
        """
        self.memory.check(nbytes * self.num_offloaded)

    def operators(self, config: FierConfig, key: Tensor, value: Tensor) -> Operators:
        """The operators of a layer with such keys and values.

        Raises:
            BackendError: the backend asked for cannot run on them.
        """
        if config.backend != "flex":
            return self._own_operators(config, key, value)
        # Not before it is needed: this imports PyTorch's compiler.
        from fierpatch.flex import FlexOperators, check_layer

        check_layer(key, value, is_compiled=config.compile)
        return FlexOperators(config, self._own_operators(config, key, value))

    def _own_operators(self, config: FierConfig, key: Tensor, value: Tensor) -> Operators:
        if choose_backend(config, key, value) == "reference":
            return ReferenceOperators(config)
        # Not before it is needed: this imports triton.
        from fierpatch.ops.kernel_operators import KernelOperators, Workspace

        workspace = self.workspaces.setdefault(key.device, Workspace())
        return KernelOperators(config, key, workspace)
