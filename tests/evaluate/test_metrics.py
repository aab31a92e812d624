"""Metrics are right by hand, by their definitions, and at their borders."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fierpatch.errors import ShapeError
from fierpatch.evaluate import metrics

shapes = st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(2, 9))
seeds = st.integers(0, 2**32 - 1)
token_lists = st.lists(st.integers(0, 3), max_size=8)


def draw_logits(shape: tuple[int, ...], seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kl_of_two_coins_is_that_on_paper() -> None:
    fair, biased = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert metrics.logit_kl(fair, biased) == pytest.approx(expected, rel=1e-6)


@given(shapes, seeds)
def test_kl_to_itself_is_zero(shape: tuple[int, ...], seed: int) -> None:
    logits = draw_logits(shape, seed)
    assert metrics.logit_kl(logits, logits) == 0


@given(shapes, seeds)
def test_kl_ignores_a_constant_added_to_all_logits(shape: tuple[int, ...], seed: int) -> None:
    logits = draw_logits(shape, seed).double()
    assert metrics.logit_kl(logits, logits + 5) < 1e-14


@given(shapes, seeds)
def test_kl_between_different_distributions_is_positive(shape: tuple[int, ...], seed: int) -> None:
    logits = draw_logits(shape, seed)
    moved = logits.clone()
    moved[0, 0, 0] += 0.5
    assert metrics.logit_kl(logits, moved) > 0
    assert metrics.logit_kl(moved, logits) > 0


@given(shapes, seeds, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_kl_is_that_of_torch_in_fp64(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    """Also over more positions than are turned to fp64 at once."""
    reference, logits = draw_logits(shape, seed).to(dtype), draw_logits(shape, seed ^ 1).to(dtype)
    log_p, log_q = (both.double().log_softmax(-1).flatten(0, 1) for both in (reference, logits))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert metrics.logit_kl(reference, logits) == pytest.approx(float(expected), rel=1e-9)


def test_kl_skips_what_the_reference_rules_out() -> None:
    reference, logits = torch.tensor([0.0, 0.0, -torch.inf]), torch.zeros(3)
    assert metrics.logit_kl(reference, reference) == 0
    assert metrics.logit_kl(reference, logits) == pytest.approx(math.log(1.5))
    assert metrics.logit_kl(logits, reference) == math.inf


def test_kl_of_different_shapes_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"\[1, 3\] and logits \[2, 3\]"):
        metrics.logit_kl(torch.zeros(1, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(), (0, 4)])
def test_no_position_to_compare_is_an_error(shape: tuple[int, ...]) -> None:
    nothing = torch.zeros(shape)
    with pytest.raises(ShapeError, match="at least one position"):
        metrics.logit_kl(nothing, nothing)
    with pytest.raises(ShapeError, match="at least one position"):
        metrics.negative_log_likelihood(nothing, torch.zeros(shape[:-1], dtype=torch.long))


@given(token_lists, token_lists)
def test_agreement_is_a_share_and_symmetric(a: list[int], b: list[int]) -> None:
    agreement = metrics.token_agreement(a, b)
    assert 0 <= agreement <= 1
    assert agreement == metrics.token_agreement(b, a)
    assert (agreement == 1) == (a == b)


def test_agreement_counts_what_only_one_has_as_different() -> None:
    assert metrics.token_agreement([1, 2, 3, 4], [1, 9, 3, 4]) == 0.75
    assert metrics.token_agreement([1, 2, 3, 4], [1, 2]) == 0.5
    assert metrics.token_agreement([1], []) == 0
    assert metrics.token_agreement([], []) == 1


def test_agreement_takes_tensors_of_any_equal_shape() -> None:
    a = torch.tensor([[1, 2], [3, 4]])
    assert metrics.token_agreement(a, a.clone()) == 1
    assert metrics.token_agreement(a, torch.tensor([[1, 2], [4, 3]])) == 0.5
    with pytest.raises(ShapeError, match="equal shapes"):
        metrics.token_agreement(a, a[:1])


@given(shapes, seeds)
def test_likelihood_is_torchs_cross_entropy_in_fp64(shape: tuple[int, ...], seed: int) -> None:
    logits = draw_logits(shape, seed)
    targets = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(seed))
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    found = metrics.negative_log_likelihood(logits, targets)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert metrics.perplexity(logits, targets) == pytest.approx(math.exp(found))


@given(st.integers(2, 1000))
def test_perplexity_of_no_idea_is_the_size_of_the_vocabulary(vocab_size: int) -> None:
    assert metrics.perplexity(torch.zeros(3, vocab_size), [0, 1, 1]) == pytest.approx(vocab_size)


def test_targets_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 5\] and targets \[3\]"):
        metrics.perplexity(torch.zeros(2, 5), [0, 1, 2])
