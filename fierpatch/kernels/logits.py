"""How scores become logits in units of log2: what a launch passes, and what kernels do with it."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fierpatch.kernels.constants import LOG2_E


@dataclass(frozen=True)
class Logits:
    """How scores become logits.

    Args:
        scale: multiplies ``q . k``.
        softcap: where positive, caps the logits as in Gemma 2.
    """

    scale: float
    softcap: float = 0.0

    @property
    def has_cap(self) -> bool:
        """Whether kernels have to `cap`."""
        return self.softcap > 0

    @property
    def factor(self) -> float:
        """What kernels multiply scores by: to units of log2, or of the cap."""
        return self.scale / self.softcap if self.has_cap else self.scale * LOG2_E.value


@triton.jit
def cap(logit, softcap):
    """``softcap * tanh(logit)`` in units of log2, where the logit is already over softcap."""
    # tanh by exp2, which the interpreter has too; its error is of float32's order.
    grown = tl.exp2(tl.abs(logit) * (2 * LOG2_E))
    magnitude = 1.0 - 2.0 / (grown + 1.0)
    return tl.where(logit < 0, -magnitude, magnitude) * (softcap * LOG2_E)
