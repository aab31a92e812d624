"""Kernels that start beside those before them give what kernels in turn do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fierpatch import FierConfig
from fierpatch.cache import LayerCache

pytestmark = pytest.mark.gpu

STEPS = 300  # past two groups of tokens and a tile


@pytest.mark.parametrize(
    ("how", "prompt"),
    [
        ({}, 400),
        ({"bits": 2}, 400),
        ({}, 100_200),
        ({"refine": 4}, 400),
        ({"refine": 4, "refine_bits": 2}, 100_200),
        ({"refine": 4, "refine_bits": "exact"}, 100_200),
    ],
    ids=str,
)
def test_steps_that_overlap_give_what_steps_in_turn_do(how: dict[str, Any], prompt: int) -> None:
    settings = FierConfig(budget=64, backend="triton", compile=True, **how)
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        size = (1, heads, length, 128)
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    query, key, value = random(32, prompt), random(8, prompt), random(8, prompt)
    layers = [LayerCache(settings, capacity=prompt + STEPS, is_static=True) for _ in range(2)]
    for layer in layers:
        layer.update(key, value)
        layer.index_prompt(query)
    in_turn, overlapping = layers
    inputs = [random(heads, STEPS) for heads in (32, 8, 8)]
    step = [tensor[:, :, :1].clone() for tensor in inputs]

    def decode(layer: LayerCache, is_in_turn: bool) -> Tensor:
        query, key, value = step
        layer.update(key, value)
        if is_in_turn:
            torch.cuda.synchronize()
        output = layer.attend(query, visible=None, scale=128**-0.5)
        assert output is not None
        return output

    def feed(number: int) -> None:
        for tensor, all_steps in zip(step, inputs, strict=True):
            tensor.copy_(all_steps[:, :, number : number + 1])

    expected = []
    for number in range(STEPS):
        feed(number)
        expected.append(decode(in_turn, True).clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode(overlapping, False)
    for number in range(STEPS):
        feed(number)
        graph.replay()
        assert torch.equal(output, expected[number]), number
    for found, wanted in zip(overlapping.state, in_turn.state, strict=True):
        assert torch.equal(found, wanted)
    assert overlapping.counters.tolist() == in_turn.counters.tolist()
