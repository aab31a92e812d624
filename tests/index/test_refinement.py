"""Codes of more bits: levels and scales are those of float64, and better scores come of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch import config
from fierpatch.errors import ConfigError
from fierpatch.index import FierIndex, RotatedIndex
from fierpatch.index.refinement import REFINE_BITS, STEPS, Refinement
from fierpatch.index.rotation import rotate
from states import build, held
from strategies import gaussian, group_sizes, seeds

BITS = st.sampled_from((2, 3, 4))
SMALL_DIMS = (3, 8, 24, 64)


def magnitudes(length: int, head_dim: int, seed: int) -> Tensor:
    """Float64 ``[1, 1, length, D]`` of float32 numbers, the first token all zero."""
    generator = torch.Generator().manual_seed(seed)
    x = gaussian((1, 1, length, head_dim), generator) * torch.rand(length, 1, generator=generator)
    x[:, :, 0] = 0
    return x.abs().double()


def sums(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and overlap with the signs."""
    return magnitude.square().sum(-1), magnitude.sum(-1)


def one_bit_scale(magnitude: Tensor) -> Tensor:
    energy, overlap = sums(magnitude)
    return torch.where(overlap > 0, energy / overlap, 0.0).half()


@given(bits=BITS, head_dim=st.sampled_from((*SMALL_DIMS, 80, 128)), seed=seeds())
def test_levels_are_the_nearest_of_a_uniform_quantiser(bits: int, head_dim: int, seed: int) -> None:
    magnitude = magnitudes(20, head_dim, seed)
    refinement = Refinement(head_dim, bits)
    is_high = torch.ones_like(magnitude, dtype=torch.bool)
    codes, ratio = refinement.encode(is_high, magnitude, *sums(magnitude))
    assert codes.shape == (1, 1, 20, refinement.code_size)
    levels, _ = refinement.decode(is_high, codes, ratio)
    x = magnitude[0, 0].numpy()
    step = (STEPS[bits] * np.sqrt((x**2).mean(1))).astype(np.float32)
    for token, found in enumerate(levels[0, 0].numpy() - 0.5):
        edges = step[token] * np.arange(1, 2 ** (bits - 1), dtype=np.float32)
        assert np.array_equal(found, np.searchsorted(edges, x[token], side="right"))
    codes, ratio = refinement.encode(~is_high, magnitude, *sums(magnitude))
    mirrored, _ = refinement.decode(~is_high, codes, ratio)
    assert torch.equal(mirrored, -levels)


@given(bits=BITS, head_dim=st.sampled_from((64, 80, 128)), seed=seeds())
def test_a_scale_makes_the_levels_unbiased(bits: int, head_dim: int, seed: int) -> None:
    """``<a b, x> = |x|^2``, but for half a step of the byte and the rounding of the scale."""
    magnitude = magnitudes(50, head_dim, seed)[:, :, 1:]
    refinement, scale = Refinement(head_dim, bits), one_bit_scale(magnitude)
    energy, overlap = sums(magnitude)
    is_high = torch.ones_like(magnitude, dtype=torch.bool)
    codes = refinement.encode(is_high, magnitude, energy, overlap)
    levels, ratio = refinement.decode(is_high, *codes)
    own = scale.double() * ratio.double()
    share = own * (levels * magnitude).sum(-1) / energy
    assert ((share - 1).abs() <= 1 / 256 + oracles.FLOAT16_EPS)[scale > 1e-4].all()


@given(
    bits=BITS,
    head_dim=st.sampled_from(SMALL_DIMS),
    group_size=group_sizes(),
    length=st.integers(1, 700),
    num_heads=st.integers(1, 3),
    seed=seeds(),
)
def test_refined_scores_are_the_query_times_the_refined_keys(
    bits: int, head_dim: int, group_size: int, length: int, num_heads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = RotatedIndex(head_dim, group_size=group_size, refine_bits=bits)
    keys = gaussian((2, 2, length, head_dim), generator)
    balance = gaussian((2, 2, head_dim), generator).exp()
    state = build(index, keys, balance=balance)
    query = gaussian((2, 2, 3, num_heads, head_dim), generator)
    tokens = torch.randint(0, length, (2, 2, 3, 9), generator=generator)
    found = index.refined_scores(state, query, tokens)
    parts = held(index, state, length)
    levels, ratio = index.refinement.decode(
        parts["bits"][:, :, :, 0], parts["codes"], parts["ratio"]
    )
    x = levels.double() * (parts["scale"].double() * ratio.double()).unsqueeze(3)
    matrix = torch.from_numpy(oracles.rotation(head_dim, index.seed))
    centres = parts["centre"].double().repeat_interleave(group_size, 2)[:, :, :length]
    refined = x @ matrix.T / balance.double().unsqueeze(2) + centres
    rows = refined.gather(2, tokens.flatten(2).unsqueeze(3).expand(-1, -1, -1, head_dim))
    rows = rows.unflatten(2, tokens.shape[2:])
    expected = query.double() @ rows.mT
    # What a score is added up of: D products, of rotations that are such sums themselves.
    turned = (query.double() / balance.double()[:, :, None, None]).abs() @ matrix.abs()
    reach = x.abs().flatten(2).amax(2)[:, :, None, None]
    terms = (
        turned.sum(-1) * reach
        + query.double().abs().sum(-1) * centres.abs().flatten(2).amax(2)[:, :, None, None]
    )
    bound = (2 * head_dim + 8) * oracles.FLOAT32_EPS * terms
    assert ((found - expected).abs() <= bound.unsqueeze(4)).all()


@given(
    bits=st.sampled_from((1, 2)), length=st.integers(1, 600), margin=st.floats(0, 4), seed=seeds()
)
def test_a_margin_is_in_units_of_the_error(
    bits: int, length: int, margin: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    index, keys = RotatedIndex(64, bits=bits), gaussian((1, 2, length, 64), generator)
    state, query = build(index, keys), gaussian((1, 2, 3, 64), generator)
    shift = index.scores(state, query, length, margin=margin) - index.scores(state, query, length)
    norm = rotate(query, state[-1]).norm(dim=-1, keepdim=True)
    expected = margin * norm * held(index, state, length)["scale"].float().unsqueeze(2)
    assert torch.allclose(shift, expected, rtol=1e-4, atol=1e-4)


def test_every_bit_halves_the_error() -> None:
    """Of random keys; four bits are left with an eighth of what one has."""
    generator = torch.Generator().manual_seed(0)
    keys, query = gaussian((1, 1, 512, 128), generator), gaussian((1, 1, 1, 8, 128), generator)
    tokens = torch.arange(512).view(1, 1, 1, 512)
    exact = query @ keys.unsqueeze(2).mT
    errors = []
    for bits in (2, 3, 4):
        index = RotatedIndex(128, refine_bits=bits)
        state = build(index, keys)
        if not errors:
            coarse = index.scores(state, query[:, :, 0], 512).unsqueeze(2)
            errors.append((coarse - exact).std().item())
        errors.append((index.refined_scores(state, query, tokens) - exact).std().item())
    for more, fewer in zip(errors[1:], errors[:-1], strict=True):
        assert more < 0.65 * fewer
    assert errors[-1] < 0.17 * errors[0]


def test_settings_allow_the_bits_that_there_are() -> None:
    assert config.REFINE_BITS == REFINE_BITS


def test_an_index_without_codes_says_so() -> None:
    query, tokens = torch.zeros(1, 1, 1, 1, 64), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    for index in (RotatedIndex(64), FierIndex(64)):
        state = index.allocate(1, 1, 512, query.device)
        with pytest.raises(ConfigError, match="codes"):
            index.refined_scores(state, query, tokens)
    with pytest.raises(ConfigError, match="margin"):
        FierIndex(64).scores(state, query[0], 1, margin=1.0)
    for bad in ({"refine_bits": 1}, {"refine_bits": 5}, {"refine_bits": 4, "bits": 2}):
        with pytest.raises(ConfigError, match="refine_bits"):
            RotatedIndex(64, **bad)
