"""What holds for every key index: its state is a function of the keys, however they came."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch.errors import ConfigError
from fierpatch.index import (
    FierIndex,
    KeyIndex,
    RotatedIndex,
    make_index,
    map_batch,
    nbytes,
    resize,
)
from states import assert_equal_states, assert_same, build, held
from strategies import (
    DTYPES,
    TAME,
    WILD,
    channel_offsets,
    constants,
    cuts,
    gaussian,
    group_sizes,
    heavy_tails,
    indexes,
    lengths,
    one_nan,
    seeds,
    ties,
)

SMALL_DIMS = (3, 8, 24, 64)
small_indexes = indexes(with_codes=True, head_dims=SMALL_DIMS)
kinds = st.sampled_from(TAME + WILD)


def make_keys(
    index: KeyIndex,
    kind: Callable[..., Tensor],
    length: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 2,
    num_kv_heads: int = 2,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return kind((batch_size, num_kv_heads, length, index.head_dim), generator).to(dtype)


@given(
    data=st.data(),
    index=small_indexes,
    kind=kinds,
    dtype=st.sampled_from(DTYPES),
    length=lengths(),
    is_calibrated=st.booleans(),
    seed=seeds(),
)
def test_appending_in_pieces_equals_appending_at_once(
    data: st.DataObject,
    index: KeyIndex,
    kind: Callable[..., Tensor],
    dtype: torch.dtype,
    length: int,
    is_calibrated: bool,
    seed: int,
) -> None:
    keys = make_keys(index, kind, length, seed, dtype=dtype)
    whole = index.allocate(2, 2, length, keys.device)
    if is_calibrated:
        index.calibrate(whole, keys[:, :, -5:].flip(2), keys, length)
    pieces = [tensor.clone() for tensor in whole]
    index.append(whole, keys, 0, length)
    for start, stop in data.draw(cuts(length)):
        # Only rows up to `stop` exist when they are appended.
        index.append(pieces, keys[:, :, :stop], start, stop)
    assert_equal_states(whole, pieces)


@pytest.mark.parametrize("name", ["fier", "rotated"])
def test_a_prompt_past_the_working_size_equals_its_pieces(name: str) -> None:
    index = make_index(name, head_dim=8)
    keys = make_keys(index, gaussian, 20_000, seed=0, batch_size=1, num_kv_heads=1)
    pieces = index.allocate(1, 1, 20_000, keys.device)
    for start in range(0, 20_000, 1_000):
        index.append(pieces, keys, start, start + 1_000)
    assert_equal_states(build(index, keys), pieces)


@given(
    index=small_indexes,
    kind=kinds,
    length=lengths(),
    kept=st.integers(0, 1500),
    changed=lengths(700),
    seed=seeds(),
)
def test_going_back_and_on_with_other_keys_equals_a_fresh_index(
    index: KeyIndex,
    kind: Callable[..., Tensor],
    length: int,
    kept: int,
    changed: int,
    seed: int,
) -> None:
    """What a crop does: the group that is open again is indexed anew, then other tokens follow."""
    kept = min(kept, length)
    keys = make_keys(index, kind, length, seed)
    state = build(index, keys, capacity=kept + changed)
    opened = kept - kept % index.group_size
    index.append(state, keys, opened, kept)
    assert_same(held(index, state, kept), held(index, build(index, keys[:, :, :kept]), kept))
    others = make_keys(index, gaussian, changed, seed + 1)
    keys = torch.cat((keys[:, :, :kept], others), dim=2)
    index.append(state, keys, kept, kept + changed)
    stop = kept + changed
    assert_same(held(index, state, stop), held(index, build(index, keys), stop))


@given(index=small_indexes, length=lengths(700), again=st.integers(0, 700), seed=seeds())
def test_appending_again_from_any_earlier_group_changes_nothing(
    index: KeyIndex, length: int, again: int, seed: int
) -> None:
    keys = make_keys(index, gaussian, length, seed)
    state = build(index, keys)
    start = min(again, length) // index.group_size * index.group_size
    index.append(state, keys, start, length)
    assert_equal_states(state, build(index, keys))


@given(index=small_indexes, kind=kinds, length=lengths(700), row=st.integers(0, 2), seed=seeds())
def test_a_row_gives_the_same_bits_in_any_batch(
    index: KeyIndex, kind: Callable[..., Tensor], length: int, row: int, seed: int
) -> None:
    keys = make_keys(index, kind, length, seed, batch_size=3)
    together = held(index, build(index, keys), length)
    alone = held(index, build(index, keys[row : row + 1].clone()), length)
    for name in alone.keys() - {"rotation"}:
        assert torch.equal(together[name][row], alone[name][0]), name


@given(
    index=small_indexes,
    length=lengths(700),
    place=st.integers(0, 699),
    bad=st.sampled_from((torch.nan, torch.inf, -torch.inf, 1e30)),
    seed=seeds(),
)
def test_a_bad_key_changes_no_other_group(
    index: KeyIndex, length: int, place: int, bad: float, seed: int
) -> None:
    """Nor, unless it is in the group before, the tokens of an open group."""
    place %= length
    keys = make_keys(index, gaussian, length, seed)
    spoilt = keys.clone()
    spoilt[:, :, place] = bad
    group_size = index.group_size
    group, last_sealed = place // group_size, length // group_size - 1
    before = held(index, build(index, keys), length)
    after = held(index, build(index, spoilt), length)
    tokens = torch.arange(length) // group_size
    is_other = tokens != group
    if group == last_sealed:
        is_other &= tokens <= last_sealed
    assert torch.equal(before["bits"][:, :, is_other], after["bits"][:, :, is_other])
    for name in before.keys() & {"scale", "zero", "centre"}:
        is_per_token = before[name].shape[2] == length
        mask = is_other if is_per_token else is_other[::group_size]
        assert torch.equal(before[name][:, :, mask], after[name][:, :, mask]), name


@given(
    index=small_indexes,
    kind=st.sampled_from(WILD),
    dtype=st.sampled_from(DTYPES),
    length=lengths(700),
    is_calibrated=st.booleans(),
    seed=seeds(),
)
def test_scores_are_finite_whatever_the_keys(
    index: KeyIndex,
    kind: Callable[..., Tensor],
    dtype: torch.dtype,
    length: int,
    is_calibrated: bool,
    seed: int,
) -> None:
    keys = make_keys(index, kind, length, seed, dtype=dtype)
    query = make_keys(index, gaussian, 3, seed + 1)
    state = index.allocate(2, 2, length, keys.device)
    if is_calibrated:
        index.calibrate(state, query, keys, length)
    index.append(state, keys, 0, length)
    assert index.scores(state, query, length).isfinite().all()
    assert index.dequantize(state, length).isfinite().all()


@given(
    index=small_indexes,
    kind=kinds,
    dtype=st.sampled_from(DTYPES),
    length=lengths(700),
    seed=seeds(),
)
def test_a_key_counts_as_the_nearest_that_float16_holds(
    index: KeyIndex, kind: Callable[..., Tensor], dtype: torch.dtype, length: int, seed: int
) -> None:
    """NaN counts as zero, and what is beyond float16 as its largest number."""
    keys = make_keys(index, kind, length, seed, dtype=dtype)
    limit = torch.finfo(torch.float16).max
    tamed = keys.float().nan_to_num(nan=0.0).clamp(-limit, limit)
    assert_equal_states(build(index, keys), build(index, tamed))


@given(
    index=indexes(with_codes=True),
    kind=st.sampled_from(TAME),
    num_queries=st.integers(1, 5),
    length=lengths(700),
    is_calibrated=st.booleans(),
    seed=seeds(),
)
def test_scores_are_the_query_times_the_dequantised_keys(
    index: KeyIndex,
    kind: Callable[..., Tensor],
    num_queries: int,
    length: int,
    is_calibrated: bool,
    seed: int,
) -> None:
    keys = make_keys(index, kind, length, seed, batch_size=1)
    query = make_keys(index, gaussian, num_queries, seed + 1, batch_size=1)
    state = index.allocate(1, 2, length, keys.device)
    if is_calibrated:
        index.calibrate(state, query, keys, length)
    index.append(state, keys, 0, length)
    scores = oracles.exact(index.scores(state, query, length))
    keys_held = oracles.exact(index.dequantize(state, length))
    for head in range(2):
        exact_query = oracles.exact(query)[0, head]  # [M, D]
        terms = magnitude(index, state, head, exact_query, length)
        # A sum of D rounded products, of a query that is itself a sum of D; then a few more steps.
        bound = (2 * index.head_dim + 8) * oracles.FLOAT32_EPS * terms
        error = np.abs(scores[0, head] - exact_query @ keys_held[0, head].T)
        assert (error <= bound).all()


def magnitude(
    index: KeyIndex, state: list[Tensor], head: int, query: np.ndarray, length: int
) -> np.ndarray:
    """The sum of the sizes of all terms that make a score, ``[M, length]``."""
    parts = {name: oracles.exact(part) for name, part in held(index, state, length).items()}
    groups = np.arange(length) // index.group_size
    if isinstance(index, RotatedIndex):
        matrix = np.abs(oracles.rotation(index.head_dim, index.seed))
        rotated = np.abs(query / parts["balance"][0, head]) @ matrix
        levels = 3 * (2 * index.bits - 1) * parts["scale"][0, head]  # 2 high - total, and so on
        centres = np.abs(parts["centre"][0, head])[groups]
        spread = rotated.sum(axis=1, keepdims=True) * levels
        # The dequantised key is rotated back, a sum of D of its own.
        return spread + np.abs(query) @ centres.T
    reach = 3 * parts["scale"][0, head] + np.abs(parts["zero"][0, head])
    return np.abs(query) @ reach[groups].T


@given(
    index=small_indexes,
    kind=st.sampled_from((gaussian, channel_offsets, ties, constants)),
    length=lengths(700),
    exponent=st.integers(-3, 3),
    seed=seeds(),
)
def test_scaling_the_keys_by_a_power_of_two_scales_the_index(
    index: KeyIndex, kind: Callable[..., Tensor], length: int, exponent: int, seed: int
) -> None:
    """The bits stay and the numbers scale: all steps but rounding to tiny float16 are linear."""
    keys = make_keys(index, kind, length, seed)
    factor = 2.0**exponent
    parts = held(index, build(index, keys), length)
    scaled = held(index, build(index, keys * factor), length)
    smallest = torch.finfo(torch.float16).smallest_normal * 8
    numbers = [parts[name] for name in parts.keys() & {"scale", "zero", "centre"}]
    assume(all(((x == 0) | (x.abs() > smallest)).all() for x in numbers))
    assert torch.equal(parts["bits"], scaled["bits"])
    for name in parts.keys() & {"scale", "zero", "centre"}:
        assert torch.equal(parts[name] * factor, scaled[name]), name


@given(
    index=small_indexes,
    length=lengths(700),
    larger=st.integers(0, 2000),
    more=lengths(300),
    seed=seeds(),
)
def test_a_resized_state_holds_the_same_index_and_goes_on(
    index: KeyIndex, length: int, larger: int, more: int, seed: int
) -> None:
    keys = make_keys(index, gaussian, length + more, seed)
    state = build(index, keys, length)
    grown = resize(index, state, length + more + larger)
    assert_same(held(index, grown, length), held(index, state, length))
    index.append(grown, keys, length, length + more)
    assert_equal_states(grown, build(index, keys, capacity=length + more + larger))


@given(
    index=small_indexes,
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    length=lengths(300),
    more=st.integers(0, 100),
    seed=seeds(),
)
def test_a_state_of_chosen_rows_is_the_index_of_those_rows(
    index: KeyIndex, rows: list[int], length: int, more: int, seed: int
) -> None:
    keys = make_keys(index, gaussian, length + more, seed, batch_size=3)
    state = build(index, keys, length, capacity=length + more)
    chosen = map_batch(index, state, lambda tensor: tensor[rows])
    index.append(chosen, keys[rows], length, length + more)
    assert_equal_states(chosen, build(index, keys[rows]))


@given(index=small_indexes, batch_size=st.integers(1, 3), heads=st.integers(1, 3), tokens=lengths())
def test_an_empty_state_has_room_in_whole_tiles(
    index: KeyIndex, batch_size: int, heads: int, tokens: int
) -> None:
    state = index.allocate(batch_size, heads, tokens, torch.device("cpu"))
    assert len(state) == len(index.tiled)
    for tensor, is_tiled in zip(state, index.tiled, strict=True):
        if is_tiled:
            assert tensor.shape[:3] == (batch_size, heads, -(-tokens // 512))
    own = state[: len(state) - index.num_constants]
    assert all(tensor.shape[:2] == (batch_size, heads) for tensor in own)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (RotatedIndex(128, bits=1, group_size=128), 20),
        (RotatedIndex(128, bits=2, group_size=128), 36),
        (RotatedIndex(128, refine_bits=2), 37),
        (RotatedIndex(128, refine_bits=4), 69),
        (FierIndex(128, group_size=32), 32),
    ],
)
def test_bytes_a_token_are_those_of_the_method(index: KeyIndex, expected: float) -> None:
    assert index.bytes_per_token == expected
    assert nbytes(index, index.allocate(1, 1, 32_768, torch.device("cpu"))) == pytest.approx(
        expected * 32_768, rel=0.02
    )


@given(index=indexes(with_codes=True), batch_size=st.integers(1, 2), heads=st.integers(1, 3))
@example(index=RotatedIndex(256, bits=2, group_size=32), batch_size=1, heads=1)
def test_the_formula_for_bytes_is_what_a_long_state_takes(
    index: KeyIndex, batch_size: int, heads: int
) -> None:
    state = index.allocate(batch_size, heads, 32_768, torch.device("cpu"))
    per_token = nbytes(index, state) / (batch_size * heads * 32_768)
    assert per_token == pytest.approx(index.bytes_per_token, rel=0.02)


@given(index=small_indexes, length=st.integers(1, 600), seed=seeds())
def test_reading_an_index_leaves_it_alone(index: KeyIndex, length: int, seed: int) -> None:
    keys = make_keys(index, heavy_tails, length, seed)
    state = build(index, keys)
    before = [tensor.clone() for tensor in state]
    index.scores(state, keys[:, :, :1], length)
    index.dequantize(state, length)
    assert_equal_states(state, before)


@given(index=small_indexes, length=lengths(300), seed=seeds())
def test_indexing_leaves_the_keys_alone(index: KeyIndex, length: int, seed: int) -> None:
    keys = make_keys(index, one_nan, length, seed)
    before = keys.clone()
    state = build(index, keys)
    index.calibrate(state, keys, keys, length)
    assert torch.equal(keys.nan_to_num(nan=7e7), before.nan_to_num(nan=7e7))


@given(group_size=group_sizes())
def test_an_index_is_made_by_name(group_size: int) -> None:
    assert make_index("fier", head_dim=64, group_size=group_size) == FierIndex(64, group_size)
    rotated = make_index("rotated", head_dim=64, bits=2, group_size=group_size, seed=5)
    assert rotated == RotatedIndex(64, bits=2, group_size=group_size, seed=5)


def test_the_group_size_of_an_index_has_its_own_default() -> None:
    assert make_index("fier", head_dim=64) == FierIndex(64, group_size=32)
    assert make_index("rotated", head_dim=64) == RotatedIndex(64, bits=1, group_size=128)


def test_an_unknown_index_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'quest'.*'rotated', 'fier'"):
        make_index("quest", head_dim=64)
