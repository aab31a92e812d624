"""Tokens that reach a layer in pieces, and what storing and indexing them has to leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fierpatch.index import KeyIndex
from fierpatch.rows import split
from kernels.tensors import HEAD_DIMS, LAYOUTS, guarded, is_intact, lay_out, set_balance, words
from states import assert_equal_states
from strategies import TAME, WILD, gaussian, indexes, seeds

# Just before, on and after the ends of planes, groups and tiles.
EDGES = (0, 1, 30, 32, 63, 127, 128, 250, 256, 383, 507, 511, 512, 513, 600)


@dataclass(frozen=True)
class Feed:
    """Tokens that reach a layer: a prompt, of which `indexed` are indexed at once, then pieces."""

    index: KeyIndex
    prompt: int
    indexed: int
    pieces: tuple[int, ...]
    batch_size: int = 1
    num_kv_heads: int = 1
    value_head_dim: int = 16
    room: int = 3  # rows of the buffer past the last token, or where negative, rows it lacks
    kind: Callable[..., Tensor] = gaussian
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    @property
    def length(self) -> int:
        return self.prompt + sum(self.pieces)


FeedBuild = tuple[KeyIndex, int, torch.dtype]  # what is compiled: index, value head dim, dtype


@st.composite
def any_build(draw: st.DrawFn) -> FeedBuild:
    index = draw(indexes(head_dims=HEAD_DIMS, with_codes=True))
    value_head_dim = draw(st.sampled_from((index.head_dim, 5, 48)))
    return index, value_head_dim, draw(st.sampled_from((torch.float32, torch.float16)))


@st.composite
def feeds(
    draw: st.DrawFn,
    *,
    longest: int = 600,
    longest_piece: int = 8,
    builds: st.SearchStrategy[FeedBuild] | None = None,
    heads: int = 2,
) -> Feed:
    index, value_head_dim, dtype = draw(any_build() if builds is None else builds)
    prompt = draw(st.sampled_from(EDGES) | st.integers(0, longest))
    how = draw(st.sampled_from(("all", "all", "none", "some")))
    indexed = {"all": prompt, "none": 0, "some": draw(st.integers(0, prompt))}[how]
    # A token alone, on top of what is indexed, has a way of its own.
    piece = st.just(1) | st.integers(1, longest_piece)
    pieces = draw(st.lists(piece, min_size=1, max_size=4))
    return Feed(
        index=index,
        prompt=prompt,
        indexed=indexed,
        pieces=tuple(pieces),
        batch_size=draw(st.integers(1, heads)),
        num_kv_heads=draw(st.integers(1, heads)),
        value_head_dim=value_head_dim,
        room=draw(st.sampled_from((0, 3, 700))),
        kind=draw(st.sampled_from((*TAME, *WILD))),
        dtype=dtype,
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(seeds()),
    )


def check_append(feed: Feed, device: torch.device, *, is_paired: bool = False) -> None:
    """State, buffers and counters are those of the reference, to the bit."""
    from fierpatch.kernels import append

    index, length = feed.index, feed.length
    capacity = max(length + feed.room, 1)
    stored = min(length, capacity)
    generator = torch.Generator().manual_seed(feed.seed)
    lead = (feed.batch_size, feed.num_kv_heads)
    keys = feed.kind((*lead, length, index.head_dim), generator).to(feed.dtype)
    values = feed.kind((*lead, length, feed.value_head_dim), generator).to(feed.dtype)
    expected = index.allocate(*lead, capacity, keys.device)
    set_balance(index, expected, generator)
    state = [tensor.to(device, copy=True) for tensor in expected]
    index.append(expected, keys, 0, stored)

    if is_paired:
        width = index.head_dim + feed.value_head_dim
        whole = guarded((capacity, *lead, width), feed.dtype, device)
        key_buffer, value_buffer = split([whole], index.head_dim)
    else:
        key_buffer = guarded((*lead, capacity, index.head_dim), feed.dtype, device)
        value_buffer = guarded((*lead, capacity, feed.value_head_dim), feed.dtype, device)
    counters = append.new_counters(device)

    def feed_tokens(which: KeyIndex | None, start: int, stop: int) -> None:
        key, value = (lay_out(x[:, :, start:stop].to(device), feed.layout) for x in (keys, values))
        own = [] if which is None else state
        append.append(which, key, value, key_buffer, value_buffer, own, counters)

    if feed.prompt:
        feed_tokens(None, 0, feed.prompt)
        assert counters.tolist() == [feed.prompt, 0, 0, 0]
    half = feed.indexed // 2
    append.index_range(index, key_buffer, state, 0, half)
    append.index_range(index, key_buffer, state, half, feed.indexed)
    counters[1] = feed.indexed
    start = feed.prompt
    for piece in feed.pieces:
        feed_tokens(index, start, start + piece)
        start += piece
        assert counters.tolist() == [start, start, 0, 0]
    for buffer, tokens in ((key_buffer, keys), (value_buffer, values)):
        assert torch.equal(words(buffer[:, :, :stored].cpu()), words(tokens[:, :, :stored]))
        assert is_intact(buffer, stored)
    assert_equal_states([tensor.cpu() for tensor in state], expected)
