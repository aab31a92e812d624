"""What the kernel that weighs blocks has to give, on any device."""

from __future__ import annotations

import numpy as np
import torch

from fierpatch.flex.blocks import KEY_BLOCK, QUERY_BLOCK, Span, rows_visible, sampled_masses
from kernels.tensors import lay_out


def check_block_masses(
    num_queries: int,
    stored: int,
    *,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    pads: tuple[int, ...] = (0,),
    has_rows: bool = False,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
) -> None:
    """Against the reference in float64; ``heads`` are KV heads and query heads of each."""
    from fierpatch.kernels.block_masses import block_masses
    from fierpatch.kernels.logits import Logits

    generator = torch.Generator(device).manual_seed(0)
    num_kv_heads, groups = heads
    length, scale = stored + num_queries, 2.0 * head_dim**-0.5

    def draw(count: int, tokens: int) -> torch.Tensor:
        shape = len(pads), count, tokens, head_dim
        tensor = torch.randn(shape, generator=generator, device=device)
        return lay_out(tensor.to(dtype), layout)

    query, keys = draw(num_kv_heads * groups, num_queries), draw(num_kv_heads, length)
    visible = None
    if any(pads) or has_rows:
        first = torch.tensor(pads, device=device)[:, None, None, None]
        visible = torch.arange(length, device=device) >= first
    if has_rows:
        shape = len(pads), 1, num_queries, length
        visible = visible & (torch.rand(shape, generator=generator, device=device) < 0.05)
    span = Span(num_queries, length, 0, -(-num_queries // QUERY_BLOCK), torch.device(device))
    samples = span.samples
    found = block_masses(
        query[:, :, samples], keys, stored + samples, Logits(scale, softcap),
        None if visible is None else rows_visible(visible, samples), key_block=KEY_BLOCK,
    )  # fmt: skip
    logits = {"scale": scale, "softcap": softcap, "visible": visible}
    expected = sampled_masses(query.double(), keys.double(), span, **logits)
    eager = sampled_masses(query, keys, span, **logits)
    assert found.shape == expected.shape
    is_seen = expected.isfinite()
    assert torch.equal(found.isfinite(), is_seen)
    assert not found.isnan().any()
    errors = [(x[is_seen].double() - expected[is_seen]).abs().max() for x in (found, eager)]
    largest = expected[is_seen].abs().max()
    # Both add up products in float32; a logarithm of a sum moves no further than its terms.
    rounding = torch.finfo(torch.float32).eps * (largest + np.sqrt(head_dim) * 4)
    assert errors[0] <= 2 * (errors[1] + rounding)
