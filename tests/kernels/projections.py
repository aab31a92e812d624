"""Linear layers of a few rows, as an estimate of a query has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.nn.functional import linear

from kernels.tensors import LAYOUTS, lay_out


@dataclass(frozen=True)
class Layer:
    """One of `num_outputs` for `num_rows` of `width` channels."""

    num_rows: int
    num_outputs: int
    width: int
    has_bias: bool = True
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    seed: int = 0


@st.composite
def any_layer(draw: st.DrawFn) -> Layer:
    """Sizes off every block, at any address and of any strides."""
    return Layer(
        num_rows=draw(st.integers(1, 20)),
        num_outputs=draw(st.integers(1, 80)),
        width=draw(st.integers(1, 300)),
        has_bias=draw(st.booleans()),
        layout=draw(st.sampled_from([layout for layout in LAYOUTS if layout != "transposed"])),
        dtype=draw(st.sampled_from((torch.float16, torch.float32))),
        seed=draw(st.integers(0, 1 << 16)),
    )


def check_projection(layer: Layer, device: torch.device) -> None:
    """The result is that of float64, to the roundings of a sum and of the result."""
    from fierpatch.kernels.project import project

    generator = torch.Generator().manual_seed(layer.seed)

    def draw(*size: int) -> torch.Tensor:
        numbers = torch.randn(size, generator=generator).to(layer.dtype)
        return lay_out(numbers, layer.layout if len(size) > 1 else "offset").to(device)

    source = draw(layer.num_rows, 1, layer.width)
    weight = draw(layer.num_outputs, layer.width)
    bias = draw(layer.num_outputs) if layer.has_bias else None
    tensors = [None if tensor is None else tensor.double() for tensor in (source, weight, bias)]
    exact = linear(*tensors)
    sizes = linear(*[None if tensor is None else tensor.abs() for tensor in tensors])
    without = project(source, weight, bias, torch.zeros(1, dtype=torch.int64, device=device))
    none = torch.zeros((), dtype=layer.dtype, device=device)
    assert torch.equal(without, (none if bias is None else bias).expand_as(without))
    length = torch.full((1,), 3, device=device)
    found = project(source, weight, bias, length)
    assert torch.equal(found, project(source, weight, bias))
    assert found.shape == (layer.num_rows, 1, layer.num_outputs)
    assert found.dtype == layer.dtype
    # Products of float16 are exact in float32, in which a sum of n terms, one after the other, errs
    # by n roundings of the sum of their sizes at the most.
    summing = (layer.width + 2) * torch.finfo(torch.float32).eps * sizes
    rounding = torch.finfo(layer.dtype).eps * exact.abs()
    assert ((found.double() - exact).abs() <= summing + rounding).all()
