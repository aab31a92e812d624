"""What Hypothesis draws: shapes and kinds of data; the tensors come from a seeded generator.

Axis letters: B batch, Hq query heads, H KV heads, G query heads a KV head, T queries, S keys,
D head dim, K budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fierpatch.index import KeyIndex, make_index

# Around every block: 32 tokens a plane, groups of 32 .. 512, 512 a tile.
LENGTHS = (1, 2, 31, 32, 33, 63, 65, 127, 128, 129, 255, 257, 511, 512, 513, 640, 1023, 1025, 1500)
SHORT_LENGTHS = tuple(length for length in LENGTHS if length <= 257)
HEAD_DIMS = (64, 80, 96, 128, 256, 8, 16, 24, 40, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def channel_offsets(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Keys as models have them: a few channels lie far from zero, each with its own spread."""
    spread = torch.randn(shape[-1], generator=generator).exp()
    offset = 5 * torch.randn(shape[-1], generator=generator).pow(3)
    return torch.randn(shape, generator=generator) * spread + offset


def heavy_tails(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.tan(3.0 * (torch.rand(shape, generator=generator) - 0.5))


def constants(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.full(shape, torch.randn((), generator=generator).item())


def ties(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Small integers, so that many keys and many scores are equal."""
    return torch.randint(-2, 3, shape, generator=generator).float()


def tiny(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 1e-30 * torch.randn(shape, generator=generator)


def one_outlier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _with_one_entry(shape, generator, 1e30)


def one_infinity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _with_one_entry(shape, generator, -math.inf)


def one_nan(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _with_one_entry(shape, generator, math.nan)


def _with_one_entry(shape: tuple[int, ...], generator: torch.Generator, entry: float) -> Tensor:
    data = torch.randn(shape, generator=generator)
    place = torch.randint(data.numel(), (1,), generator=generator)
    data.view(-1)[place] = entry
    return data


# Data that no step of the method has to round away, and data that padding or a fault may leave.
TAME: tuple[Callable[..., Tensor], ...] = (gaussian, channel_offsets, heavy_tails, constants, ties)
WILD: tuple[Callable[..., Tensor], ...] = (tiny, one_outlier, one_infinity, one_nan)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def generators() -> st.SearchStrategy[torch.Generator]:
    return seeds().map(lambda seed: torch.Generator().manual_seed(seed))


def lengths(longest: int = 1500) -> st.SearchStrategy[int]:
    """Lengths on and off every block size, and any other."""
    edges = [length for length in LENGTHS if length <= longest]
    return st.sampled_from(edges) | st.integers(1, longest)


def budgets() -> st.SearchStrategy[int]:
    """From one token to beyond any length that `lengths` draws."""
    return st.sampled_from((1, 2, 16, 31, 32, 33, 64, 128, 512, 2000)) | st.integers(1, 300)


@dataclass(frozen=True)
class Shape:
    """Axes of an attention problem."""

    batch_size: int
    num_kv_heads: int
    num_groups: int
    num_queries: int
    length: int
    head_dim: int
    value_head_dim: int

    @property
    def query(self) -> tuple[int, int, int, int]:
        heads = self.num_kv_heads * self.num_groups
        return (self.batch_size, heads, self.num_queries, self.head_dim)

    @property
    def keys(self) -> tuple[int, int, int, int]:
        return (self.batch_size, self.num_kv_heads, self.length, self.head_dim)

    @property
    def values(self) -> tuple[int, int, int, int]:
        return (*self.keys[:3], self.value_head_dim)


@st.composite
def shapes(
    draw: st.DrawFn, *, longest: int = 1500, head_dims: tuple[int, ...] = HEAD_DIMS
) -> Shape:
    length = draw(lengths(longest))
    head_dim = draw(st.sampled_from(head_dims))
    return Shape(
        batch_size=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 3)),
        num_groups=draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8))),
        num_queries=draw(st.integers(1, min(length, 4))),
        length=length,
        head_dim=head_dim,
        value_head_dim=draw(st.sampled_from((head_dim, 5))),
    )


@dataclass(frozen=True, repr=False)
class Problem:
    """Tensors of an attention problem; `visible` is None where nothing is padding."""

    query: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor | None
    description: str

    def __repr__(self) -> str:
        """What was drawn, not the numbers."""
        return f"Problem({self.description})"


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    longest: int = 600,
    head_dims: tuple[int, ...] = (8, 24, 64, 80),
    kinds: tuple[Callable[..., Tensor], ...] = TAME,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Problem:
    """Queries, keys and values of one dtype; sometimes left-padded with NaN in the padding."""
    shape = draw(shapes(longest=longest, head_dims=head_dims))
    kind = draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from(dtypes))
    is_padded = draw(st.booleans())
    seed = draw(seeds())
    generator = torch.Generator().manual_seed(seed)
    query = gaussian(shape.query, generator).to(dtype)
    keys = kind(shape.keys, generator).to(dtype)
    values = gaussian(shape.values, generator).to(dtype)
    description = f"{shape}, {kind.__name__}, {dtype}, {seed=}"
    if not is_padded:
        return Problem(query, keys, values, None, description)
    padding = draw(
        st.lists(st.integers(0, shape.length), min_size=shape.batch_size, max_size=shape.batch_size)
    )
    for row, num_padded in enumerate(padding):
        keys[row, :, :num_padded] = torch.nan
        values[row, :, :num_padded] = torch.nan
    visible = left_padded_visible(padding, shape.num_queries, shape.length)
    return Problem(query, keys, values, visible, f"{description}, {padding=}")


def left_padded_visible(padding: list[int], num_queries: int, length: int) -> Tensor:
    """Bool ``[B, 1, T, S]``: causal for the last T tokens, without each row's first tokens."""
    tokens = torch.arange(length)
    causal = tokens <= torch.arange(length - num_queries, length)[:, None]  # [T, S]
    is_real = tokens >= torch.tensor(padding)[:, None]  # [B, S]
    return causal & is_real[:, None, None, :]


@st.composite
def masks(draw: st.DrawFn, batch_size: int, num_queries: int, length: int) -> Tensor | None:
    """A visible mask of any broadcastable shape: none, padding, random, or all dark."""
    kind = draw(st.sampled_from(("none", "padded", "random", "sparse", "dark", "queries")))
    if kind == "none":
        return None
    if kind == "padded":
        padding = draw(st.lists(st.integers(0, length), min_size=batch_size, max_size=batch_size))
        return left_padded_visible(padding, num_queries, length)
    generator = draw(generators())
    batch = draw(st.sampled_from((1, batch_size)))
    queries = draw(st.sampled_from((1, num_queries)))
    chance = {"random": 0.7, "sparse": 0.05, "dark": 0.0, "queries": 0.5}[kind]
    width = 1 if kind == "queries" else length
    return torch.rand((batch, 1, queries, width), generator=generator) < chance


def group_sizes() -> st.SearchStrategy[int]:
    return st.sampled_from((32, 64, 128, 256, 512))


@st.composite
def indexes(
    draw: st.DrawFn, *, head_dims: tuple[int, ...] = HEAD_DIMS, with_codes: bool = False
) -> KeyIndex:
    """Any index: FIER bits, or rotated with one or two bits, of any group size.

    With codes, also one bit with more of them for a second scoring.
    """
    kinds = (("rotated", 1, 0), ("rotated", 2, 0), ("fier", 1, 0))
    coded = tuple(("rotated", 1, bits) for bits in (2, 3, 4)) if with_codes else ()
    name, bits, refine_bits = draw(st.sampled_from((*kinds, *coded)))
    return make_index(
        name,
        head_dim=draw(st.sampled_from(head_dims)),
        bits=bits,
        group_size=draw(group_sizes()),
        seed=draw(st.integers(0, 3)),
        refine_bits=refine_bits,
    )


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Consecutive ranges that cover ``0 .. length``: one, every token, or random pieces."""
    how = draw(st.sampled_from(("bulk", "pieces", "tokens")))
    if how == "bulk":
        stops = [length]
    elif how == "tokens" and length <= 160:
        stops = list(range(1, length + 1))
    else:
        inner = draw(st.lists(st.integers(0, length), max_size=6))
        stops = sorted([*inner, length])
    return list(zip([0, *stops[:-1]], stops, strict=True))
