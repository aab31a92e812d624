"""Each block of queries attends the blocks of keys that the naive choice gives it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from fierpatch.flex.blocks import (
    KEY_BLOCK,
    QUERY_BLOCK,
    SAMPLES,
    Span,
    candidate_blocks,
    choose_blocks,
    kept_blocks,
    whole_blocks,
)
from fierpatch.flex.prefill import PrefillSettings, chosen_blocks
from fierpatch.flex.span_attention import Operands

CPU = torch.device("cpu")
EPS = 1e-5  # of a share; float32 sums of a row differ by less


@dataclass(frozen=True)
class Prompt:
    """T queries behind `stored` tokens; row b of the batch starts with ``padding[b]`` unseen."""

    num_queries: int = 300
    stored: int = 0
    num_kv_heads: int = 2
    num_groups: int = 1
    padding: tuple[int, ...] = (0,)
    head_dim: int = 8
    scale: float = 1.0
    softcap: float = 0.0
    seed: int = 0

    @property
    def length(self) -> int:
        return self.stored + self.num_queries

    @property
    def visible(self) -> Tensor | None:
        """Padding alone, as ``[B, 1, 1, S]``."""
        if not any(self.padding):
            return None
        return (torch.arange(self.length) >= torch.tensor(self.padding)[:, None])[:, None, None]

    def operands(self) -> Operands:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, tokens: int) -> Tensor:
            shape = len(self.padding), heads, tokens, self.head_dim
            return torch.randn(shape, generator=generator)

        keys, values = (draw(self.num_kv_heads, self.length) for _ in range(2))
        query = draw(self.num_kv_heads * self.num_groups, self.num_queries)
        return Operands(
            query, keys, values, self.scale, self.softcap, visible=self.visible
        )  # fmt: skip


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    num_queries, stored = draw(st.integers(1, 400)), draw(st.just(0) | st.integers(0, 300))
    most = stored + num_queries - 1
    return Prompt(
        num_queries,
        stored,
        num_kv_heads=draw(st.integers(1, 2)),
        num_groups=draw(st.integers(1, 3)),
        padding=tuple(draw(st.lists(st.just(0) | st.integers(0, most), min_size=1, max_size=2))),
        scale=draw(st.sampled_from((0.2, 1.0, 3.0))),
        softcap=draw(st.sampled_from((0.0, 2.0))),
        seed=draw(st.integers(0, 2**31)),
    )


settings = st.builds(
    PrefillSettings,
    mass=st.sampled_from((0.3, 0.8, 0.95, 0.99)),
    minimum=st.integers(1, 300),
    sinks=st.integers(0, 80),
    recent=st.integers(1, 150),
)


def naive_choice(
    prompt: Prompt, operands: Operands, settings: PrefillSettings, mass: float
) -> list[set[int]]:
    """The chosen key blocks for every batch row, query head and block of queries, in order."""
    query, keys = oracles.exact(operands.query), oracles.exact(operands.keys)
    choices = []
    blocks = -(-prompt.num_queries // QUERY_BLOCK)
    for b, h, n in np.ndindex(*query.shape[:2], blocks):
        first, stored = prompt.padding[b], prompt.stored
        stop = min((n + 1) * QUERY_BLOCK, prompt.num_queries)
        low, high = stored + n * QUERY_BLOCK, stored + stop - 1
        candidates = {t // KEY_BLOCK for t in range(first, high + 1)}
        shares = dict.fromkeys(candidates, 0.0)
        for sample in range(SAMPLES):
            row = n * QUERY_BLOCK + (2 * sample + 1) * QUERY_BLOCK // SAMPLES // 2
            row = min(row, prompt.num_queries - 1)
            seen = range(first, stored + row + 1)
            products = keys[b, h // prompt.num_groups, first : stored + row + 1] @ query[b, h, row]
            logits = oracles._capped(products * prompt.scale, prompt.softcap)
            if len(seen):
                for token, weight in zip(seen, oracles._softmax(logits, None), strict=True):
                    shares[token // KEY_BLOCK] += weight / SAMPLES
        kept = {t // KEY_BLOCK for t in range(first, min(first + settings.sinks, prompt.length))}
        kept |= {t // KEY_BLOCK for t in range(max(low - settings.recent + 1, 0), high + 1)}
        ranked = sorted(candidates, key=lambda j: (j not in kept, -shares[j], j))
        chosen, held = set(), 0.0
        for rank, block in enumerate(ranked):
            is_needed = held < mass * sum(shares.values()) or rank * KEY_BLOCK < settings.minimum
            if block in kept or is_needed:
                chosen.add(block)
            held += shares[block]
        choices.append(chosen)
    return choices


@given(prompts(), settings)
@example(Prompt(500, num_groups=3, softcap=2.0), PrefillSettings(0.8, 1, 4, 16))
@example(Prompt(9, 130, padding=(0, 100)), PrefillSettings(0.8, 100, 4, 16))
@example(Prompt(200, 64, padding=(263, 1)), PrefillSettings(0.95, 1, 0, 1))  # one token is left
@example(Prompt(128, 128), PrefillSettings(0.3, 1, 64, 65))  # whole blocks, and one token over
def test_blocks_are_chosen_as_the_naive_choice_has_it(
    prompt: Prompt, settings: PrefillSettings
) -> None:
    operands = prompt.operands()
    last = -(-prompt.num_queries // QUERY_BLOCK)
    span = Span(prompt.num_queries, prompt.length, 0, last, CPU)
    chosen = chosen_blocks(operands, operands.keys, span, settings)
    fewest = naive_choice(prompt, operands, settings, settings.mass - EPS)
    most = naive_choice(prompt, operands, settings, settings.mass + EPS)
    for found, low, high in zip(chosen.flatten(0, 2), fewest, most, strict=True):
        blocks = set(found.nonzero().flatten().tolist())
        assert low <= blocks <= high


@given(prompts(), settings, st.integers(0, 3))
def test_a_span_chooses_as_the_whole_prompt_does(
    prompt: Prompt, settings: PrefillSettings, first: int
) -> None:
    operands = prompt.operands()
    last = -(-prompt.num_queries // QUERY_BLOCK)
    first = min(first, last - 1)
    whole, part = (
        chosen_blocks(
            operands,
            operands.keys,
            Span(prompt.num_queries, prompt.length, start, last, CPU),
            settings,
        )
        for start in (0, first)
    )
    # Products of fewer rows may round otherwise, which moves a share by no more than EPS.
    assert (whole[:, :, first:] != part).float().mean() < 0.05


SHARES = st.lists(st.integers(0, 64), min_size=1, max_size=12)  # of 1024, exact in float32


@given(SHARES, st.data())
def test_the_fewest_blocks_that_hold_the_mass_are_chosen(
    shares: list[int], data: st.DataObject
) -> None:
    number = len(shares)
    flags = st.lists(st.booleans(), min_size=number, max_size=number)
    candidates, kept = data.draw(flags), data.draw(flags)
    shares = [x if is_candidate else 0 for x, is_candidate in zip(shares, candidates, strict=True)]
    mass = data.draw(st.integers(1, 1024)) / 1024
    minimum = data.draw(st.integers(0, number))
    chosen = choose_blocks(
        torch.tensor(shares)[None, None, None] / 1024,
        torch.tensor(candidates)[None, None, None],
        torch.tensor(kept)[None, None, None],
        mass=mass,
        minimum=minimum,
    )
    there = [j for j in range(number) if candidates[j]]
    expected = there
    if mass < 1:
        ranked = sorted(there, key=lambda j: (not kept[j], -shares[j], j))
        held = [sum(shares[i] for i in ranked[:rank]) for rank in range(len(ranked))]
        expected = sorted(
            j
            for rank, j in enumerate(ranked)
            if kept[j] or rank < minimum or held[rank] < mass * sum(shares)
        )
    assert chosen.flatten().nonzero().flatten().tolist() == expected


@given(prompts(), st.integers(0, 80), st.integers(1, 150), st.booleans())
def test_blocks_are_candidates_kept_and_whole_as_their_cells_are(
    prompt: Prompt, sinks: int, recent: int, has_rows: bool
) -> None:
    """Cell by cell; `visible` may have a row for every query, or one for all."""
    last = -(-prompt.num_queries // QUERY_BLOCK)
    span = Span(prompt.num_queries, prompt.length, 0, last, CPU)
    visible = prompt.visible
    if visible is not None and has_rows:
        visible = visible.expand(-1, -1, prompt.num_queries, -1)
    position = prompt.stored + torch.arange(prompt.num_queries)[:, None]
    token = torch.arange(prompt.length)
    first = torch.tensor(prompt.padding)[:, None, None]
    seen = (token <= position) & (token >= first)  # [B, T, S]
    if visible is None:
        seen = seen[:1]
    near = (token > position - recent) | (token < first + sinks)

    def blocks(cells: Tensor, *, is_all: bool) -> Tensor:
        outside = is_all  # cells past the end decide nothing
        shape = cells.shape[0], last * QUERY_BLOCK, span.num_key_blocks * KEY_BLOCK
        padded = torch.full(shape, outside)
        padded[:, : prompt.num_queries, : prompt.length] = cells
        tiles = padded.unflatten(1, (-1, QUERY_BLOCK)).unflatten(3, (-1, KEY_BLOCK))
        return (tiles.all(4).all(2) if is_all else tiles.any(4).any(2))[:, None]

    candidates = candidate_blocks(span, visible)
    assert torch.equal(candidates, blocks(seen, is_all=False))
    kept = kept_blocks(span, sinks=sinks, recent=recent, visible=visible) & candidates
    assert torch.equal(kept, blocks(seen & near[: len(seen)], is_all=False))
    whole = whole_blocks(span, visible)
    assert not (whole & ~blocks(seen, is_all=True)).any()
    if visible is None or not has_rows:
        low, _ = span.bounds
        is_before = (torch.arange(span.num_key_blocks) + 1) * KEY_BLOCK <= low[:, None] + 1
        assert torch.equal(whole, blocks(seen, is_all=True) & is_before)


def test_a_mass_of_1_chooses_every_candidate() -> None:
    shares = torch.tensor([1.0, 0.0, 1e-30, 0.0]).expand(1, 1, 1, 4)
    candidates = torch.tensor([True, True, True, False])
    chosen = choose_blocks(shares, candidates, torch.zeros(4, dtype=bool), mass=1.0, minimum=0)
    assert chosen.flatten().tolist() == candidates.tolist()


@pytest.mark.parametrize("count", [1, 127, 128, 129])
def test_the_last_queries_of_a_prompt_have_samples_of_their_own(count: int) -> None:
    span = Span(count, count, 0, -(-count // QUERY_BLOCK), CPU)
    samples = span.samples
    assert len(samples) == span.num_blocks * SAMPLES
    assert samples.max() <= count - 1
    assert (samples[1:] >= samples[:-1]).all()
