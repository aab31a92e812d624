"""FIER's bits are those of the paper."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import oracles
from fierpatch.index import FierIndex
from states import build, held
from strategies import DTYPES, TAME, gaussian, group_sizes, lengths, seeds, ties

kinds = st.sampled_from(TAME)


@given(
    kind=kinds,
    dtype=st.sampled_from(DTYPES),
    group_size=group_sizes(),
    length=lengths(700),
    head_dim=st.sampled_from((3, 24, 64)),
    seed=seeds(),
)
@example(kind=gaussian, dtype=torch.bfloat16, group_size=32, length=513, head_dim=80, seed=0)
@example(kind=ties, dtype=torch.float32, group_size=32, length=33, head_dim=3, seed=0)
def test_bits_scale_and_zero_are_those_of_the_paper(
    kind: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    group_size: int,
    length: int,
    head_dim: int,
    seed: int,
) -> None:
    index = FierIndex(head_dim, group_size)
    generator = torch.Generator().manual_seed(seed)
    keys = kind((1, 2, length, head_dim), generator).to(dtype)
    parts = held(index, build(index, keys), length)
    for head in range(2):
        exact_keys = oracles.exact(keys)[0, head]
        bits, zero, scale = oracles.fier_quantize(exact_keys, group_size)
        groups = np.arange(length) // group_size
        # The middle is a rounded sum, so a key within that rounding may fall on either side.
        rounding = 2 * oracles.FLOAT32_EPS * (np.abs(zero) + scale)
        is_decided = (np.abs(exact_keys - zero[groups]) > rounding[groups]) | (scale[groups] == 0)
        assert (parts["bits"][0, head, :, 0].numpy() == bits)[is_decided].all()
        for name, expected in (("zero", zero), ("scale", scale)):
            error = np.abs(oracles.exact(parts[name])[0, head] - expected)
            assert (error <= oracles.half_error(expected) + rounding).all(), name


@given(kind=kinds, group_size=group_sizes(), length=lengths(700), seed=seeds())
def test_dequantised_keys_are_zero_plus_or_minus_scale(
    kind: Callable[..., torch.Tensor], group_size: int, length: int, seed: int
) -> None:
    index = FierIndex(8, group_size)
    keys = kind((1, 1, length, 8), torch.Generator().manual_seed(seed))
    state = build(index, keys)
    parts = held(index, state, length)
    expected = oracles.fier_dequantize(
        parts["bits"][0, 0, :, 0].numpy(),
        oracles.exact(parts["zero"])[0, 0],
        oracles.exact(parts["scale"])[0, 0],
        group_size,
    )
    found = oracles.exact(index.dequantize(state, length))[0, 0]
    assert (np.abs(found - expected) <= oracles.FLOAT32_EPS * np.abs(expected)).all()


@given(kind=kinds, group_size=group_sizes(), length=lengths(700), seed=seeds())
def test_the_extremes_of_a_group_are_kept(
    kind: Callable[..., torch.Tensor], group_size: int, length: int, seed: int
) -> None:
    """A dequantised entry is its group's highest or lowest, to float16."""
    index = FierIndex(8, group_size)
    keys = kind((1, 1, length, 8), torch.Generator().manual_seed(seed))
    found = oracles.exact(index.dequantize(build(index, keys), length))[0, 0]
    exact_keys = oracles.exact(keys)[0, 0]
    for start in range(0, length, group_size):
        group = slice(start, start + group_size)
        highest, lowest = exact_keys[group].max(axis=0), exact_keys[group].min(axis=0)
        distance = np.minimum(np.abs(found[group] - highest), np.abs(found[group] - lowest))
        size = np.abs(highest) + np.abs(lowest)
        assert (distance <= 2 * oracles.half_error(size)).all()
        # No bit is on the wrong side: a key never moves by more than half the range.
        moved = np.abs(found[group] - exact_keys[group])
        assert (moved <= (highest - lowest) / 2 + 2 * oracles.half_error(size)).all()


@given(constant=st.floats(-1000, 1000, width=16), length=lengths(300))
def test_a_constant_channel_is_held_exactly(constant: float, length: int) -> None:
    index = FierIndex(8)
    keys = torch.full((1, 1, length, 8), constant)
    assert torch.equal(index.dequantize(build(index, keys), length), keys)


def test_a_key_in_the_middle_counts_as_high() -> None:
    keys = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 3, 1)
    index = FierIndex(1)
    expected = torch.tensor([-1.0, 1.0, 1.0]).view(1, 1, 3, 1)
    assert torch.equal(index.dequantize(build(index, keys), 3), expected)


def test_fier_has_nothing_to_calibrate() -> None:
    index = FierIndex(8)
    keys = torch.randn(1, 1, 600, 8)
    state = build(index, keys)
    before = [tensor.clone() for tensor in state]
    assert index.calibrate(state, keys, keys, 600) is False
    assert all(torch.equal(*pair) for pair in zip(state, before, strict=True))
