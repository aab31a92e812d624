"""Selection is exact: the largest keys, ties to the lowest position, for any logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given

from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from kernels.choices import (
    Choice,
    check_choice,
    check_chosen,
    check_interruption,
    choices,
    chunks_at_most,
    counting_paths,
    gentle,
    inject,
    level,
    lopsided,
    peaked,
    wide,
)
from kernels.steps import Retrieval, make_step
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
@example(Choice(Retrieval(INDEX, shape(2048), budget=900), lopsided))
@example(Choice(Retrieval(INDEX, shape(2500), budget=900, per_query_head=True), lopsided, 2))
@example(
    Choice(
        Retrieval(
            INDEX,
            shape(1300, batch_size=2),
            budget=2000,
            visible=left_padded_visible([600, 1290], 1, 1300),
        ),
        gentle,
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


PATHS = (  # kind of logits, chunks at most, and whether chunks count all at once
    (level, 64, {True}),
    (peaked, 64, {True}),
    (gentle, 64, {False}),
    (lopsided, 64, {True, False}),
    (lopsided, 2, {True, False}),
    (lopsided, 1, {True}),
)


@pytest.mark.parametrize(("kind", "max_chunks", "paths"), PATHS)
def test_few_and_many_keys_at_the_threshold_are_counted_alike(
    kind: Callable[..., torch.Tensor], max_chunks: int, paths: set[bool]
) -> None:
    with chunks_at_most(max_chunks):
        case = Retrieval(INDEX, shape(2048, num_groups=1), budget=850)
        if kind is gentle:
            case = replace(case, budget=20)
        step = make_step(case, CPU, is_indexed=False)
        step.scratch.high.zero_()
        generator = torch.Generator().manual_seed(0)
        logits = inject(step, kind((1, 1, 1, 2048, 1), generator))
        check_chosen(step, step.select(), logits)
        assert counting_paths(step) == [paths]


@pytest.mark.parametrize("index", [RotatedIndex(64), FierIndex(64)], ids=str)
@pytest.mark.parametrize("per_query_head", [False, True])
def test_what_an_interrupted_step_left_does_not_change_the_next(
    index: KeyIndex, per_query_head: bool
) -> None:
    axes = Shape(1, 2, 3, 2, 100, 64, 64)
    check_interruption(Retrieval(index, axes, per_query_head=per_query_head), CPU)


@pytest.mark.parametrize("max_chunks", [1, 3, 64])
@pytest.mark.parametrize("rows", [1, 2, 100, 256, 300])
@pytest.mark.parametrize("tiles", [1, 5, 100, 2048])
@pytest.mark.parametrize("block", [0, 512])
def test_chunks_cover_every_token_once(block: int, tiles: int, rows: int, max_chunks: int) -> None:
    from fierpatch.kernels import shape

    with chunks_at_most(max_chunks):
        sizes = shape.Shape(INDEX, rows, 1, 1, 1, tiles, 64, False, block)
        assert sizes.select_block == block or not block
        assert sizes.select_block % 512 == 0
        size = sizes.select_block * sizes.blocks_per_chunk
        assert (sizes.chunks - 1) * size < tiles * 512 <= sizes.chunks * size
        assert sizes.chunks <= max_chunks
        assert sizes.chunks * rows <= max(shape._MAX_PROGRAMS, rows)
