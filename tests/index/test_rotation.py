"""The rotation is one fixed orthogonal matrix, and no batch changes a bit of what it gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch.index.rotation import rotate, rotation_matrix
from strategies import HEAD_DIMS, TAME, constants, gaussian, heavy_tails, seeds, ties

head_dims = st.sampled_from(HEAD_DIMS) | st.integers(1, 260)


@given(head_dim=head_dims, seed=seeds())
def test_a_seed_fixes_the_matrix_on_every_machine(head_dim: int, seed: int) -> None:
    """It holds integers, so nothing is rounded, and the global generator has no part in it."""
    matrix = rotation_matrix(head_dim, seed)
    torch.rand(5)
    assert torch.equal(matrix, rotation_matrix(head_dim, seed))
    assert matrix.dtype in (torch.int8, torch.int32)


def test_another_seed_gives_another_matrix() -> None:
    assert not torch.equal(rotation_matrix(64, 0), rotation_matrix(64, 1))


@given(head_dim=head_dims, seed=seeds())
def test_the_rotation_is_orthogonal(head_dim: int, seed: int) -> None:
    rotated = rotate(torch.eye(head_dim, dtype=torch.float64), rotation_matrix(head_dim, seed))
    error = (rotated @ rotated.T - torch.eye(head_dim)).abs().max()
    assert error <= head_dim * torch.finfo(torch.float64).eps


@given(head_dim=head_dims, seed=seeds())
@example(head_dim=96, seed=1)
@example(head_dim=80, seed=1)
def test_the_rotation_is_the_dense_matrix_of_its_description(head_dim: int, seed: int) -> None:
    """Sylvester's Hadamard matrix with random signs where head_dim is a power of two."""
    rotated = rotate(torch.eye(head_dim, dtype=torch.float64), rotation_matrix(head_dim, seed))
    error = np.abs(oracles.exact(rotated) - oracles.rotation(head_dim, seed)).max()
    assert error <= 4 * torch.finfo(torch.float64).eps


@given(
    kind=st.sampled_from(TAME),
    head_dim=head_dims,
    seed=seeds(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_a_rotated_row_is_rounded_once(
    kind: Callable[..., Tensor], head_dim: int, seed: int, dtype: torch.dtype
) -> None:
    x = kind((7, head_dim), torch.Generator().manual_seed(seed)).to(dtype)
    rotated = rotate(x, rotation_matrix(head_dim, seed))
    assert rotated.dtype == dtype
    expected = oracles.exact(x) @ oracles.rotation(head_dim, seed)
    in_float64 = 4 * head_dim * torch.finfo(torch.float64).eps * x.double().norm(dim=-1).numpy()
    bound = torch.finfo(dtype).eps * np.abs(expected) + in_float64[:, None]
    assert (np.abs(oracles.exact(rotated) - expected) <= bound).all()


@given(head_dim=head_dims, seed=seeds(), exponent=st.integers(-10, 10))
def test_the_norm_stays(head_dim: int, seed: int, exponent: int) -> None:
    x = gaussian((7, head_dim), torch.Generator().manual_seed(seed)) * 2.0**exponent
    norms = x.double().norm(dim=-1)
    rotated = rotate(x, rotation_matrix(head_dim, seed)).double().norm(dim=-1)
    # Every entry is rounded once, so no entry and no norm moves by more than that.
    assert ((rotated - norms).abs() <= torch.finfo(torch.float32).eps * norms).all()


@given(
    kind=st.sampled_from((gaussian, ties, constants, heavy_tails)),
    head_dim=head_dims,
    seed=seeds(),
    count=st.integers(1, 40),
    place=st.integers(0, 39),
)
def test_a_key_gives_the_same_bits_in_any_batch(
    kind: Callable[..., Tensor], head_dim: int, seed: int, count: int, place: int
) -> None:
    x = kind((2, count, head_dim), torch.Generator().manual_seed(seed))
    matrix = rotation_matrix(head_dim, seed)
    place %= count
    whole = rotate(x, matrix)
    assert torch.equal(whole[:, place], rotate(x[:, place].contiguous(), matrix))
    assert torch.equal(whole, rotate(x.transpose(0, 1), matrix).transpose(0, 1))
