"""The linear layer of an estimate is PyTorch's to rounding, whatever its sizes."""

from __future__ import annotations

import torch
from hypothesis import example, given

from kernels.projections import Layer, any_layer, check_projection
from kernels.tensors import few


@few(30)
@given(layer=any_layer())
@example(Layer(1, 1, 1))
@example(Layer(17, 33, 257, dtype=torch.float16))
def test_a_projection_is_a_linear_layer(layer: Layer) -> None:
    check_projection(layer, torch.device("cpu"))
