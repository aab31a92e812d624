"""The rotated index is that of its description: centred, balanced, rotated, unbiased."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import oracles
from fierpatch.index import RotatedIndex
from states import assert_equal_states, build, held
from strategies import (
    DTYPES,
    HEAD_DIMS,
    TAME,
    channel_offsets,
    gaussian,
    group_sizes,
    heavy_tails,
    lengths,
    seeds,
)

one_or_two = st.sampled_from((1, 2))


def draw_balance(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).exp()


@given(
    kind=st.sampled_from(TAME),
    dtype=st.sampled_from(DTYPES),
    bits=one_or_two,
    group_size=group_sizes(),
    length=lengths(600),
    head_dim=st.sampled_from(HEAD_DIMS),
    is_balanced=st.booleans(),
    seed=seeds(),
)
@example(
    kind=gaussian,
    dtype=torch.bfloat16,
    bits=2,
    group_size=128,
    length=513,
    head_dim=128,
    is_balanced=True,
    seed=0,
)
def test_the_state_is_that_of_the_description(
    kind: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    length: int,
    head_dim: int,
    is_balanced: bool,
    seed: int,
) -> None:
    index = RotatedIndex(head_dim, bits=bits, group_size=group_size, seed=seed % 4)
    generator = torch.Generator().manual_seed(seed)
    keys = kind((1, 1, length, head_dim), generator).to(dtype)
    balance = draw_balance((1, 1, head_dim), generator) if is_balanced else None
    state = build(index, keys, balance=balance)
    parts = {name: oracles.exact(part) for name, part in held(index, state, length).items()}
    exact_keys, found_balance = oracles.exact(keys)[0, 0], parts["balance"][0, 0]

    expected_centres = oracles.rotated_centres(exact_keys, group_size)
    centres = parts["centre"][0, 0]
    rounding = 12 * oracles.FLOAT32_EPS * np.abs(exact_keys).max()
    error = np.abs(centres - expected_centres)
    assert (error <= oracles.half_error(expected_centres) + rounding).all()

    # From here on with the centres as they are, since a rounded one is another centre.
    matrix = oracles.rotation(head_dim, index.seed)
    x = oracles.rotated_keys(exact_keys, centres, found_balance, matrix, group_size)
    levels, scales = oracles.rotated_levels(x, bits)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    tolerance = 4 * oracles.FLOAT32_EPS * norms  # centred, balanced, rotated: a rounding each
    sigma = norms / math.sqrt(head_dim)
    is_decided = np.abs(x) > tolerance
    if bits == 2:
        is_decided &= np.abs(np.abs(x) - 0.9816 * sigma) > tolerance
    found_levels = 2 * parts["bits"][0, 0, :, 0] - 1
    if bits == 2:
        found_levels = 2 * found_levels + 2 * parts["bits"][0, 0, :, 1] - 1
    assert (found_levels == levels)[is_decided].all()

    is_known = is_decided.all(axis=1)
    found_scales = parts["scale"][0, 0]
    error = np.abs(found_scales - scales)
    allowed = oracles.half_error(scales) + 2 * tolerance[:, 0]
    assert (error <= allowed)[is_known].all()

    found = oracles.exact(index.dequantize(state, length))[0, 0]
    expected = oracles.rotated_dequantize(
        found_levels, found_scales, centres, found_balance, matrix, group_size
    )
    size = np.abs(found_levels).max() * found_scales[:, None] * math.sqrt(head_dim) / found_balance
    size = size + np.abs(centres)[np.arange(length) // group_size]
    assert (np.abs(found - expected) <= (head_dim + 8) * oracles.FLOAT32_EPS * size).all()


@given(
    kind=st.sampled_from((gaussian, channel_offsets, heavy_tails)),
    bits=one_or_two,
    length=lengths(600),
    head_dim=st.sampled_from(HEAD_DIMS),
    seed=seeds(),
)
def test_the_scale_makes_the_estimate_of_a_key_with_itself_exact(
    kind: Callable[..., torch.Tensor], bits: int, length: int, head_dim: int, seed: int
) -> None:
    """``<a b, x> = |x|^2`` but for the rounding of ``a``: no bias along the key."""
    index = RotatedIndex(head_dim, bits=bits)
    keys = kind((1, 1, length, head_dim), torch.Generator().manual_seed(seed))
    state = build(index, keys)
    centre = oracles.exact(held(index, state, length)["centre"])[0, 0]
    centred = oracles.exact(keys)[0, 0] - centre[np.arange(length) // 128]
    estimate = oracles.exact(index.dequantize(state, length))[0, 0]
    estimate -= centre[np.arange(length) // 128]
    energy = (centred**2).sum(axis=1)
    found = (estimate * centred).sum(axis=1)
    # One entry near zero may take the other sign; that moves <b, x> by less than its rounding.
    reach = np.abs(centre).max() + np.abs(centred).max()
    float32_error = 4 * head_dim * oracles.FLOAT32_EPS * reach * np.sqrt(energy * head_dim)
    levels = 3 if bits == 2 else 1
    subnormal = oracles.FLOAT16_STEP * levels * np.sqrt(energy * head_dim)
    assert (
        np.abs(found - energy) <= oracles.FLOAT16_EPS * energy + subnormal + float32_error
    ).all()


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_over_many_rotations_scores_are_unbiased(bits: int, head_dim: int) -> None:
    """For keys without a channel that outweighs the others: one round of signs cannot hide that."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 128, head_dim, generator=generator)
    query = torch.randn(1, 1, 4, head_dim, generator=generator)
    runs = []
    for seed in range(200):
        index = RotatedIndex(head_dim, bits=bits, seed=seed)
        runs.append(index.scores(build(index, keys), query, 128))
    errors = torch.stack(runs).double() - query.double() @ keys.double().transpose(2, 3)
    standard_error = errors.std(0) / len(runs) ** 0.5
    # 512 normal means: the largest is within 5 standard errors but once in 3000 times.
    assert (errors.mean(0).abs() <= 5 * standard_error).all()


@given(length=st.integers(64, 600), head_dim=st.sampled_from((16, 24, 64, 80, 128)), seed=seeds())
def test_two_bits_err_no_more_than_one(length: int, head_dim: int, seed: int) -> None:
    keys = gaussian((1, 1, length, head_dim), torch.Generator().manual_seed(seed))
    error = {}
    for bits in (1, 2):
        index = RotatedIndex(head_dim, bits=bits)
        error[bits] = (index.dequantize(build(index, keys), length) - keys).square().sum()
    assert error[2] <= error[1]


@given(bits=one_or_two, length=st.integers(129, 600), seed=seeds())
def test_an_open_group_borrows_the_mean_of_the_last_whole_one(
    bits: int, length: int, seed: int
) -> None:
    assume(length % 128 != 0)
    index = RotatedIndex(16, bits=bits)
    keys = channel_offsets((1, 1, length, 16), torch.Generator().manual_seed(seed))
    centre = held(index, build(index, keys), length)["centre"]
    assert torch.equal(centre[:, :, -1], centre[:, :, -2])


@given(length=st.integers(1, 127), seed=seeds())
def test_the_first_open_group_has_no_centre(length: int, seed: int) -> None:
    index = RotatedIndex(16)
    keys = channel_offsets((1, 1, length, 16), torch.Generator().manual_seed(seed))
    assert (held(index, build(index, keys), length)["centre"] == 0).all()


@given(
    offset=st.floats(-100, 100, width=16), bits=one_or_two, groups=st.integers(1, 4), seed=seeds()
)
def test_a_channel_offset_costs_no_accuracy(
    offset: float, bits: int, groups: int, seed: int
) -> None:
    """The centre takes it up, so the bits describe the rest."""
    index = RotatedIndex(16, bits=bits)
    # Steps of 2^-3 around a zero mean, so that the mean is exact and so is the offset.
    keys = torch.randint(-16, 17, (1, 1, 64 * groups, 16), generator=_generator(seed)) / 8
    keys = torch.cat((keys, -keys), dim=2).unflatten(2, (2, groups, 64)).transpose(2, 3)
    keys = keys.flatten(2, 4)
    moved = keys + round(offset)
    parts = held(index, build(index, keys), keys.shape[2])
    parts_moved = held(index, build(index, moved), keys.shape[2])
    assert torch.equal(parts["bits"], parts_moved["bits"])
    assert torch.equal(parts["scale"], parts_moved["scale"])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    kind=st.sampled_from((gaussian, channel_offsets, heavy_tails)),
    bits=one_or_two,
    group_size=group_sizes(),
    length=st.integers(512, 2000),
    num_queries=st.integers(1, 40),
    seed=seeds(),
)
def test_the_balance_is_that_of_the_formula(
    kind: Callable[..., torch.Tensor],
    bits: int,
    group_size: int,
    length: int,
    num_queries: int,
    seed: int,
) -> None:
    """``(E q^2 / E (k - mu)^2)^(1/4)`` but for a common factor, and never of no effect or harm."""
    index = RotatedIndex(16, bits=bits, group_size=group_size)
    generator = torch.Generator().manual_seed(seed)
    keys = kind((2, 2, length, 16), generator)
    query = channel_offsets((2, 2, num_queries, 16), generator)
    whole_groups = length // group_size
    assume(whole_groups <= 32)  # all of them are sampled
    state = index.allocate(2, 2, length, keys.device)
    assert index.calibrate(state, query, keys, length) is True
    balance = oracles.exact(state[3])
    assert (balance > 0).all()
    assert np.isfinite(balance).all()
    assert np.log(balance).mean(axis=-1) == pytest.approx(0, abs=1e-5)
    exact_keys, exact_query = oracles.exact(keys), oracles.exact(query)
    for b, h in np.ndindex(2, 2):
        groups = exact_keys[b, h, : whole_groups * group_size].reshape(-1, group_size, 16)
        key_energy = ((groups - groups.mean(axis=1, keepdims=True)) ** 2).mean(axis=(0, 1))
        query_energy = (exact_query[b, h] ** 2).mean(axis=0)
        key_floor, query_floor = 1e-6 * key_energy.mean(), 1e-6 * query_energy.mean()
        d = (np.maximum(query_energy, query_floor) / np.maximum(key_energy, key_floor)) ** 0.25
        assert balance[b, h] == pytest.approx(d / np.exp(np.log(d).mean()), rel=1e-4)

        def noise(balance: np.ndarray, keys: np.ndarray, query: np.ndarray) -> float:
            """What the balance is to make least: ``E |q / d|^2 E |d (k - mu)|^2``."""
            return float((query / balance**2).sum() * (keys * balance**2).sum())

        # The floors add at most a millionth to either sum.
        unbalanced = noise(np.ones(16), key_energy, query_energy) * (1 + 1e-5)
        assert noise(balance[b, h], key_energy, query_energy) <= unbalanced


@given(seed=seeds(), bits=one_or_two, stretch=st.integers(2, 5))
def test_a_balanced_index_ranks_better_where_channels_differ(
    seed: int, bits: int, stretch: int
) -> None:
    """Queries strong where keys are weak, as RoPE and biases make them."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-stretch / 2, stretch / 2, 64, base=4.0)
    keys = torch.randn((1, 1, 512, 64), generator=generator) * spread
    query = torch.randn((1, 1, 32, 64), generator=generator) / spread
    index = RotatedIndex(64, bits=bits)
    plain = build(index, keys)
    balanced = index.allocate(1, 1, 512, keys.device)
    index.calibrate(balanced, query, keys, 512)
    index.append(balanced, keys, 0, 512)
    exact = query.double() @ keys.double().transpose(2, 3)
    error_plain, error_balanced = (
        (index.scores(state, query, 512) - exact).square().mean() for state in (plain, balanced)
    )
    assert error_balanced <= error_plain


@given(length=st.integers(1, 600), group_size=group_sizes(), seed=seeds())
def test_too_short_a_prompt_does_not_calibrate(length: int, group_size: int, seed: int) -> None:
    assume(length < max(128, group_size))
    index = RotatedIndex(8, group_size=group_size)
    keys = gaussian((1, 1, length, 8), torch.Generator().manual_seed(seed))
    state = build(index, keys)
    before = [tensor.clone() for tensor in state]
    assert index.calibrate(state, keys, keys, length) is False
    assert_equal_states(state, before)


@given(length=st.integers(128, 600), bad=st.sampled_from((torch.nan, torch.inf, 1e30, 0.0)))
def test_calibration_survives_any_key_and_query(length: int, bad: float) -> None:
    index = RotatedIndex(8)
    keys = torch.randn(1, 1, length, 8)
    keys[:, :, 5:90, 2:] = bad
    query = torch.full((1, 1, 3, 8), bad)
    state = index.allocate(1, 1, length, keys.device)
    index.calibrate(state, query, keys, length)
    assert state[3].isfinite().all()
    assert (state[3] > 0).all()


def test_two_seeds_give_two_rotations() -> None:
    keys = torch.randn(1, 1, 128, 64)
    states = [build(RotatedIndex(64, seed=seed), keys) for seed in (0, 1)]
    assert not torch.equal(states[0][0], states[1][0])
