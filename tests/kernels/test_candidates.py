"""The second scoring: candidates as the reference scores them, and the best of them, exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given

from fierpatch.index import FierIndex, RotatedIndex
from kernels.candidates import (
    CODED,
    SecondChoice,
    check_candidate_scores,
    check_injected,
    check_refined_lists,
    coded,
    second_choices,
)
from kernels.choices import Choice, check_agreement, check_choice, gentle, level, lopsided, peaked
from kernels.scores import check_scores
from kernels.steps import Retrieval, any_refining_build, retrievals
from kernels.tensors import few
from strategies import Shape, channel_offsets, heavy_tails, left_padded_visible, ties

CPU = torch.device("cpu")
MASKED = replace(
    coded(batch_size=2, num_queries=2), visible=left_padded_visible([100, 560], 2, 600)
)
BY_KEYS = replace(coded(num_groups=3), index=FierIndex(64), has_sink=True, softcap=20.0)


@few(5)
@given(case=retrievals(builds=any_refining_build()))
@example(case=coded())
@example(case=MASKED)
@example(case=BY_KEYS)
@example(case=replace(coded(num_groups=11), per_query_head=True, has_sink=True))
@example(case=replace(coded(num_groups=11, num_kv_heads=2), kind=channel_offsets))
@example(case=replace(coded(), index=RotatedIndex(64, group_size=32, refine_bits=2), softcap=9.0))
@example(
    case=Retrieval(
        RotatedIndex(80, refine_bits=3),
        Shape(1, 2, 2, 3, 300, 80, 80),
        budget=20,
        refine=3,
        kind=heavy_tails,
        dtype=torch.float16,
    )
)
@example(case=replace(BY_KEYS, index=RotatedIndex(64, bits=2), dtype=torch.float16))
def test_candidates_are_scored_by_their_codes_or_keys(case: Retrieval) -> None:
    check_candidate_scores(case, CPU)


@few(4)
@given(case=retrievals(builds=any_refining_build()))
@example(case=MASKED)
@example(case=BY_KEYS)
@example(case=replace(coded(num_groups=3), index=RotatedIndex(64, bits=2)))
def test_candidates_are_the_best_by_what_they_may_weigh(case: Retrieval) -> None:
    check_scores(case, CPU)
    check_agreement(case, CPU)


@pytest.mark.parametrize(
    ("logits", "max_chunks"), [(gentle, 64), (level, 2), (peaked, 3), (ties, 1), (lopsided, 64)]
)
def test_candidates_are_exactly_the_largest_keys(logits: object, max_chunks: int) -> None:
    axes = Shape(1, 2, 3, 1, 2500, 8, 8)
    case = Retrieval(FierIndex(8), axes, 200, sinks=4, recent=16, has_sink=True, refine=4)
    check_choice(Choice(case, logits, max_chunks), CPU)  # type: ignore[arg-type]


@few(10)
@given(choice=second_choices())
@example(SecondChoice(replace(coded(length=5000), budget=1500), gentle))
@example(SecondChoice(replace(coded(num_groups=11, length=9000), budget=900), ties, 0.5))
@example(SecondChoice(replace(coded(), budget=12), level))
@example(SecondChoice(replace(coded(num_groups=2), budget=300), peaked, 0.01))
def test_the_chosen_candidates_are_exactly_those_of_the_largest_keys(choice: SecondChoice) -> None:
    check_injected(choice, CPU)


@few(3)
@given(case=retrievals(builds=any_refining_build(), longest=700))
@example(case=MASKED)
@example(case=BY_KEYS)
def test_with_a_candidate_for_every_token_the_second_scores_alone_decide(case: Retrieval) -> None:
    check_refined_lists(case, CPU)


def test_the_indexes_have_the_codes_these_tests_are_about() -> None:
    assert CODED.refined_bytes_per_token > 0
    assert FierIndex(64).refined_bytes_per_token == 0
