"""The rotation is one fixed orthogonal matrix, and no batch changes a bit of what it gives."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import oracles
from fierpatch.index.rotation import halving_sum, random_signs, rotate, rotation_matrix
from strategies import HEAD_DIMS, seeds

head_dims = st.sampled_from(HEAD_DIMS) | st.integers(1, 260)


def rounding(head_dim: int) -> float:
    """Error of a rotated unit vector: one rounding for each of about ``log2 D + 4`` steps."""
    return (math.log2(head_dim) + 4) * torch.finfo(torch.float32).eps


@given(head_dim=head_dims, seed=seeds())
def test_signs_are_plus_or_minus_one_and_fixed_by_the_seed(head_dim: int, seed: int) -> None:
    signs = random_signs(head_dim, seed)
    assert signs.dtype == torch.float32
    assert set(signs.tolist()) <= {1.0, -1.0}
    torch.rand(5)  # the global generator has no part in them
    assert torch.equal(signs, random_signs(head_dim, seed))


def test_another_seed_gives_other_signs() -> None:
    assert not torch.equal(random_signs(64, 0), random_signs(64, 1))


@given(head_dim=head_dims, seed=seeds())
def test_the_rotation_is_orthogonal(head_dim: int, seed: int) -> None:
    matrix = oracles.exact(rotation_matrix(random_signs(head_dim, seed)))
    error = np.abs(matrix @ matrix.T - np.eye(head_dim)).max()
    assert error <= 3 * rounding(head_dim)  # both factors, and their product


@given(head_dim=head_dims, seed=seeds())
@example(head_dim=96, seed=1)
@example(head_dim=80, seed=1)
def test_the_rotation_is_the_dense_matrix_of_its_description(head_dim: int, seed: int) -> None:
    """Sylvester's Hadamard matrix with random signs where head_dim is a power of two."""
    signs = random_signs(head_dim, seed)
    expected = oracles.rotation(oracles.exact(signs))
    error = np.abs(oracles.exact(rotation_matrix(signs)) - expected).max()
    assert error <= rounding(head_dim)


@given(head_dim=head_dims, seed=seeds(), exponent=st.integers(-10, 10))
def test_the_norm_stays(head_dim: int, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, head_dim, generator=generator) * 2.0**exponent
    norms = np.linalg.norm(oracles.exact(x), axis=-1)
    rotated = rotate(x, random_signs(head_dim, seed))
    error = np.abs(np.linalg.norm(oracles.exact(rotated), axis=-1) - norms)
    assert (error <= rounding(head_dim) * math.sqrt(head_dim) * norms).all()


@given(head_dim=head_dims, seed=seeds(), count=st.integers(1, 40), place=st.integers(0, 39))
def test_a_key_gives_the_same_bits_in_any_batch(
    head_dim: int, seed: int, count: int, place: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = random_signs(head_dim, seed)
    x = torch.randn(2, count, head_dim, generator=generator)
    place %= count
    whole = rotate(x, signs)
    assert torch.equal(whole[:, place], rotate(x[:, place].contiguous(), signs))
    assert torch.equal(whole, rotate(x.transpose(0, 1), signs).transpose(0, 1))


@given(
    shape=st.tuples(*(st.integers(1, 70) for _ in range(3))), dim=st.integers(-1, 2), seed=seeds()
)
def test_a_halving_sum_is_a_sum(shape: tuple[int, int, int], dim: int, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    exact = oracles.exact(x).sum(axis=dim)
    # A sum of n terms by halves rounds every term about log2(n) times.
    bound = (math.log2(shape[dim]) + 1) * oracles.FLOAT32_EPS * oracles.exact(x.abs()).sum(axis=dim)
    assert (np.abs(oracles.exact(halving_sum(x, dim)) - exact) <= bound).all()


@given(size=st.integers(1, 300), seed=seeds())
def test_a_halving_sum_has_the_same_bits_in_any_batch(size: int, seed: int) -> None:
    x = torch.randn(5, size, 6, generator=torch.Generator().manual_seed(seed))
    whole = halving_sum(x, 1)
    for place in range(6):
        assert torch.equal(whole[3, place], halving_sum(x[3, :, place].contiguous(), 0))
