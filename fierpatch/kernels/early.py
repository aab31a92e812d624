"""Starting a kernel beside the one before it: CUDA's programmatic dependent launch.

That one has to say when, and the next has to wait for what it wrote. What kernels before those two
wrote may be read at once, but past the first-level cache, which a new kernel finds emptied and one
that starts early perhaps not.

A step is two such rows of kernels: append, query, scores, keys; and low, compact, attention, or
with a second scoring compact, scores of candidates, choice among them, attention. Where keys and
values are on the host, placement comes before the attention: it waits for the list before it lets
that start, which goes on beside it and waits only at its end. In a row a kernel is done only when
the one before it is, because one of its programs at least waits, so that to wait for the last is
enough.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start_next(IS_EARLY: tl.constexpr):
    """Let the next kernel start when all programs of this one have come here."""
    if IS_EARLY:
        gdc_launch_dependents()


@triton.jit
def await_previous(IS_EARLY: tl.constexpr):
    """Wait for the kernel before, and for what it wrote."""
    if IS_EARLY:
        gdc_wait()


@cache
def can_start_early(device: torch.device) -> bool:
    """Whether the device can: NVIDIA's, from compute capability 9.0 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
