"""Selection is exact: the largest keys, ties to the lowest position, for any logits."""

from __future__ import annotations

import torch
from hypothesis import example, given

from fierpatch.index import FierIndex
from kernels.choices import Choice, check_choice, choices, gentle, level, peaked, wide
from kernels.steps import Retrieval
from kernels.tensors import few
from strategies import Shape, heavy_tails, left_padded_visible, ties

INDEX = FierIndex(8)
CPU = torch.device("cpu")


def shape(length: int, num_queries: int = 1, num_groups: int = 4, batch_size: int = 1) -> Shape:
    return Shape(batch_size, 1, num_groups, num_queries, length, 8, 8)


@few(20)
@given(choice=choices())
@example(Choice(Retrieval(INDEX, shape(2048), budget=300), level))
@example(Choice(Retrieval(INDEX, shape(2047), budget=513, sinks=4, recent=16), ties, 2))
@example(Choice(Retrieval(INDEX, shape(1500, num_groups=11), budget=64), heavy_tails, 1))
@example(Choice(Retrieval(INDEX, shape(1600, 3), budget=9, recent=9, room=2), wide))
@example(Choice(Retrieval(INDEX, shape(1025), budget=1100, per_query_head=True), wide, 2))
@example(Choice(Retrieval(INDEX, shape(1024), budget=200, has_sink=True), gentle))
@example(Choice(Retrieval(INDEX, shape(1024), budget=1024), gentle, 2))
@example(Choice(Retrieval(INDEX, shape(1024), budget=20, per_query_head=True), peaked, 3))
@example(
    Choice(
        Retrieval(
            INDEX,
            shape(1300, num_queries=2, batch_size=2),
            budget=40,
            sinks=4,
            recent=16,
            visible=left_padded_visible([600, 1290], 2, 1300),
        ),
        ties,
        2,
    )
)
@example(
    Choice(
        Retrieval(
            INDEX,
            shape(700),
            budget=30,
            visible=torch.zeros((1, 1, 1, 700), dtype=torch.bool),
        ),
        gentle,
    )
)
def test_the_chosen_are_exactly_the_largest_keys(choice: Choice) -> None:
    check_choice(choice, CPU)
