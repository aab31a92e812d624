"""Bit planes hold exactly what was written, where the layout says."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fierpatch.index.packing import TILE_SIZE, num_tiles, plane_dot, read_bits, write_bits
from strategies import cuts, lengths, seeds


def random_planes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)


def random_bits(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) < 0.5


@given(tokens=st.integers(0, 10**6))
def test_tiles_hold_the_tokens_and_no_tile_is_idle(tokens: int) -> None:
    assert num_tiles(tokens) * TILE_SIZE >= tokens > (num_tiles(tokens) - 1) * TILE_SIZE


@given(start=lengths(1100), count=st.integers(0, 1100), seed=seeds())
@example(start=0, count=512, seed=0)
@example(start=511, count=2, seed=0)
@example(start=100, count=1436, seed=0)
@example(start=480, count=32, seed=0)  # the plane of the sign bit
@example(start=0, count=8 * 1024 + 512, seed=0)  # past what is packed at once
def test_writing_sets_its_own_bits_and_no_others(start: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    planes = random_planes((2, 1, num_tiles(start + count) + 1, 32, 3), generator)
    bits = random_bits((2, 1, count, 3), generator)
    expected = read_bits(planes)
    expected[:, :, start : start + count] = bits
    write_bits(planes, start, bits)
    assert torch.equal(read_bits(planes), expected)


@given(data=st.data(), length=lengths(), seed=seeds())
def test_writing_in_pieces_equals_writing_at_once(
    data: st.DataObject, length: int, seed: int
) -> None:
    bits = random_bits((1, 2, length, 3), torch.Generator().manual_seed(seed))
    whole = torch.zeros(1, 2, num_tiles(length), 32, 3, dtype=torch.int16)
    pieces = whole.clone()
    write_bits(whole, 0, bits)
    for start, stop in data.draw(cuts(length)):
        write_bits(pieces, start, bits[:, :, start:stop])
    assert torch.equal(whole, pieces)


@given(token=st.integers(0, 3 * TILE_SIZE - 1), channel=st.integers(0, 4))
def test_a_token_has_the_bit_that_the_layout_gives_it(token: int, channel: int) -> None:
    """Bit p of the word at row r belongs to token 32 p + r of its tile."""
    planes = torch.zeros(1, 1, 3, 32, 5, dtype=torch.int16)
    bits = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    bits[..., channel] = True
    write_bits(planes, token, bits)
    tile, place = divmod(token, TILE_SIZE)
    plane, row = divmod(place, 32)
    words = planes.numpy().view("uint16")
    assert words[0, 0, tile, row, channel] == 1 << plane
    assert (words != 0).sum() == 1


def test_half_of_the_rows_may_be_another_plane_set() -> None:
    """Two-bit indexes keep both bits' words in one tensor and write to each through a view."""
    generator = torch.Generator().manual_seed(0)
    both = torch.zeros(1, 1, 2, 64, 3, dtype=torch.int16)
    high, low = (random_bits((1, 1, 700, 3), generator) for _ in range(2))
    write_bits(both[..., :32, :], 0, high)
    write_bits(both[..., 32:, :], 0, low)
    assert torch.equal(read_bits(both[..., :32, :])[:, :, :700], high)
    assert torch.equal(read_bits(both[..., 32:, :])[:, :, :700], low)


@given(
    shape=st.tuples(*(st.integers(1, 3) for _ in range(4)), st.sampled_from((1, 3, 40, 64, 128))),
    is_shared=st.booleans(),
    seed=seeds(),
)
def test_plane_dot_sums_the_channels_of_the_set_bits(
    shape: tuple[int, int, int, int, int], is_shared: bool, seed: int
) -> None:
    batch_size, num_heads, tiles, num_queries, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    planes = random_planes((batch_size, num_heads, tiles, 64, head_dim), generator)[..., :32, :]
    per_plane = () if is_shared else (tiles, 16)
    query = torch.randn(
        batch_size, num_heads, *per_plane, num_queries, head_dim, generator=generator
    )
    bits = read_bits(planes).unflatten(2, (tiles, 16, 32))  # [B, H, tiles, 16, 32, D]

    def matmul(dtype: torch.dtype) -> Tensor:
        operand = query.to(dtype)
        if is_shared:
            operand = operand[:, :, None, None]
        sums = operand @ bits.to(dtype).transpose(4, 5)  # [B, H, tiles, 16, M, 32]
        return sums.permute(0, 1, 4, 2, 3, 5).flatten(3)

    exact = matmul(torch.float64)
    eager_error = (matmul(torch.float32) - exact).abs().max()
    error = (plane_dot(planes, query) - exact).abs().max()
    assert error <= 2 * (eager_error + torch.finfo(torch.float32).eps * exact.abs().max())


def test_a_dot_with_no_query_channel_set_is_zero() -> None:
    planes = torch.full((1, 1, 1, 32, 4), -1, dtype=torch.int16)
    assert torch.equal(plane_dot(planes, torch.zeros(1, 1, 2, 4)), torch.zeros(1, 1, 2, 512))
