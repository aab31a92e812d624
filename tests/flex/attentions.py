"""Attention over selected tokens against float64, as checks that any device and mode can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fierpatch.reference import gather_attention
from flex.cases import random_lists


@dataclass(frozen=True)
class Attention:
    """Sizes and options of one attention; its tensors come from a seed."""

    batch_size: int = 2
    num_kv_heads: int = 2
    num_groups: int = 3
    num_queries: int = 1
    length: int = 300
    head_dim: int = 16
    value_head_dim: int = 16
    width: int = 40
    per_query_head: bool = False
    softcap: float = 0.0
    has_sinks: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def tensors(self, seed: int, *, is_dark: bool = False) -> tuple[Tensor, ...]:
        """Query, keys, values and lists; `is_dark` leaves all lists empty."""
        generator = torch.Generator().manual_seed(seed)
        heads, groups = self.num_kv_heads, self.num_groups
        lead = (self.batch_size, heads, self.length)
        shapes = (
            (self.batch_size, heads * groups, self.num_queries, self.head_dim),
            (*lead, self.head_dim),
            (*lead, self.value_head_dim),
        )
        made = [torch.randn(shape, generator=generator) for shape in shapes]
        num_lists = heads * groups if self.per_query_head else heads
        sizes = (self.batch_size, num_lists, self.num_queries, self.length, self.width)
        lists = random_lists(*sizes, generator)
        lists = torch.full_like(lists, -1) if is_dark else lists
        return *(x.to(self.device, self.dtype) for x in made), lists.to(self.device)

    def options(self, seed: int = 0) -> dict[str, Any]:
        """Scale, softcap and sink logits."""
        generator = torch.Generator().manual_seed(seed)
        sinks = torch.randn(self.num_kv_heads * self.num_groups, generator=generator)
        # A model's own dtype, which the computation has to leave.
        given = sinks.to(self.device, self.dtype) if self.has_sinks else None
        return {"scale": 0.3, "softcap": self.softcap, "sink_logits": given}


def log_sum_exp(
    query: Tensor, keys: Tensor, lists: Tensor, *, scale: float, softcap: float, sink_logits: Any
) -> Tensor:
    """Of the logits of each list's tokens and the sink, ``[B, Hq, T]``, in float64."""
    num_groups = query.shape[1] // keys.shape[1]
    scores = query.double() @ keys.double().repeat_interleave(num_groups, 1).transpose(2, 3)
    logits = scores * scale
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    spread = lists.repeat_interleave(query.shape[1] // lists.shape[1], 1)
    chosen = logits.gather(3, spread.clamp_min(0)).masked_fill(spread < 0, -torch.inf)
    has_any = (spread >= 0).any(-1)
    if sink_logits is not None:
        beside = sink_logits.double()[:, None, None].expand(*chosen.shape[:3], 1)
        chosen = torch.cat((chosen, beside), 3)
    return torch.where(has_any, chosen.logsumexp(-1), -torch.inf)


# torch's compiled kernel for CPUs takes its exponentials by exp_u20, "a faster version of exp with
# ULP=20" (ATen/cpu/vec/vec512/vec512_float.h): so many units in the last place of a float32.
CPU_EXP_ULPS = 20


def assert_near(
    output: Tensor, tensors: tuple[Tensor, ...], options: dict[str, Any], *, exp_ulps: int = 0
) -> None:
    """Within twice the error of the reference in the same dtype and a rounding of the largest.

    Args:
        exp_ulps: units in the last place that the weights may be off besides.
    """
    query, keys, values, lists = tensors
    exact = gather_attention(
        query.double(), keys.double(), values.double(), lists,
        **options | {"sink_logits": _double(options["sink_logits"])},
    )  # fmt: skip
    reference = gather_attention(query, keys, values, lists, **options)
    assert output.dtype == query.dtype
    assert output.shape == exact.shape
    largest = exact.abs().max()
    error, allowed = ((x.double() - exact).abs().max() for x in (output, reference))
    allowed = 2 * (allowed + torch.finfo(query.dtype).eps * largest)
    allowed += exp_ulps * 2.0**-24 * values.abs().max()
    assert error <= allowed, f"{error:.2e} against {allowed:.2e}"
    # Of what has no tokens, exactly 0.
    assert not output[exact == 0].any()


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()
