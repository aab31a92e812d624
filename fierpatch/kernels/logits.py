"""How scores become logits: what a launch passes, and what kernels do with it."""

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
        """What kernels multiply scores by: to logits, or to units of the cap."""
        return self.scale / self.softcap if self.has_cap else self.scale

    @property
    def in_log2(self) -> Logits:
        """The same in units of log2, so that ``exp2`` turns logits into weights."""
        return Logits(self.scale * LOG2_E.value, self.softcap * LOG2_E.value)

    def over(self, temperature: float) -> Logits:
        """The same divided by a temperature."""
        return Logits(self.scale / temperature, self.softcap / temperature)


@triton.jit
def cap(logit, softcap):
    """``softcap * tanh(logit)``, where the logit is already over softcap."""
    # tanh by exp2, which the interpreter has too. Where that cancels, a polynomial for
    # (tanh(x) / x - 1) / x ** 2, fitted for the least relative error: within 2 of float32's eps.
    x = tl.abs(logit)
    grown = tl.exp2(x * (2 * LOG2_E))
    square = x * x
    series = (0.02065056 - 0.00571701 * square) * square - 0.05374349
    series = (series * square + 0.13331491) * square - 0.33333284
    magnitude = tl.where(x < 0.625, x + x * (series * square), 1.0 - 2.0 / (grown + 1.0))
    return tl.where(logit < 0, -magnitude, magnitude) * softcap
