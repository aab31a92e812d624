"""Steps of retrieval: what they are drawn from, and the kernels called on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fierpatch.index import KeyIndex
from fierpatch.index.packing import TILE_SIZE, num_tiles
from fierpatch.select import CANDIDATE_TEMPERATURE, causal_visible
from kernels.tensors import GROUPS, HEAD_DIMS, LAYOUTS, lay_out, set_balance
from strategies import Shape, channel_offsets, gaussian, heavy_tails, indexes, masks, seeds, ties


@dataclass(frozen=True, repr=False)
class Retrieval:
    """A step of retrieval: an index full of keys, queries, and how to choose."""

    index: KeyIndex
    shape: Shape
    budget: int = 64
    sinks: int = 0
    recent: int = 1
    per_query_head: bool = False
    softcap: float = 0.0
    has_sink: bool = False
    visible: Tensor | None = None  # broadcastable to [B, 1, T, S]
    kind: Callable[..., Tensor] = gaussian
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    room: int = 0  # tiles of the index past those of the tokens
    block: int = 512  # 0 leaves it to the kernels' own choice
    refine: int = 0
    seed: int = 0

    def __repr__(self) -> str:
        """What was drawn, not the numbers of the mask."""
        mask = None if self.visible is None else tuple(self.visible.shape)
        rest = {name: x for name, x in vars(self).items() if name != "visible"}
        return f"Retrieval({rest}, visible={mask})"

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def temperature(self) -> float:
        """Of the first scoring, which is of candidates where there is a second."""
        return CANDIDATE_TEMPERATURE if self.refine else 1.0

    @property
    def first_budget(self) -> int:
        """Tokens that the first selection chooses."""
        return self.budget * max(self.refine, 1)

    @property
    def seen(self) -> Tensor:
        """What each query sees: bool ``[B, 1, T, S]``."""
        axes, cpu = self.shape, torch.device("cpu")
        visible = self.visible
        if visible is None:
            visible = causal_visible(axes.num_queries, axes.length, cpu)
        return visible.expand(axes.batch_size, 1, axes.num_queries, axes.length)


@dataclass(frozen=True)
class Build:
    """What decides which kernels a retrieval needs compiled."""

    index: KeyIndex
    num_groups: int = 4
    dtype: torch.dtype = torch.float32
    per_query_head: bool = False
    softcap: float = 0.0
    has_sink: bool = False
    has_mask: bool = False
    refine: int = 0


def any_build() -> st.SearchStrategy[Build]:
    return st.builds(
        Build,
        index=indexes(head_dims=HEAD_DIMS),
        num_groups=st.sampled_from(GROUPS),
        dtype=st.sampled_from((torch.float32, torch.float16)),
        per_query_head=st.booleans(),
        softcap=st.sampled_from((0.0, 0.0, 20.0)),
        has_sink=st.booleans(),
        has_mask=st.sampled_from((False, True, True, True)),
    )


@st.composite
def any_refining_build(draw: st.DrawFn) -> Build:
    """By codes where the index has them, else by keys."""
    index = draw(indexes(head_dims=HEAD_DIMS, with_codes=True))
    build = draw(any_build())
    return replace(build, index=index, refine=draw(st.sampled_from((2, 3, 4, 7))))


@st.composite
def retrievals(
    draw: st.DrawFn,
    *,
    builds: st.SearchStrategy[Build] | None = None,
    longest: int = 1100,
    most_rows: int = 8,
    block: int = 512,
) -> Retrieval:
    """Steps of up to `most_rows` rows, a KV head and query each."""
    build = draw(any_build() if builds is None else builds)
    length = draw(st.sampled_from((1, 2, 31, 33, 129, 511, 512, 513, 640, 1025)))
    length = draw(st.just(length) | st.integers(1, longest))
    num_queries = draw(st.integers(1, min(8, length, most_rows)))
    batch_size = draw(st.integers(1, min(2, most_rows // num_queries)))
    heads = draw(st.integers(1, min(2, most_rows // num_queries // batch_size)))
    head_dim = build.index.head_dim
    shape = Shape(
        batch_size=batch_size,
        num_kv_heads=heads,
        num_groups=build.num_groups,
        num_queries=num_queries,
        length=length,
        head_dim=head_dim,
        value_head_dim=draw(st.sampled_from((head_dim, 5, 48))),
    )
    sinks, recent = draw(st.sampled_from(((0, 0), (0, 1), (4, 16), (1, 40))))
    budget = draw(st.sampled_from((1, 2, 33, 64, 256, 2000)) | st.integers(1, 300))
    visible = None
    if build.has_mask:
        drawn = masks(batch_size, num_queries, length)
        visible = draw(drawn.filter(lambda mask: mask is not None))
    return Retrieval(
        index=build.index,
        shape=shape,
        budget=max(budget, sinks + recent),
        sinks=sinks,
        recent=recent,
        per_query_head=build.per_query_head,
        softcap=build.softcap,
        has_sink=build.has_sink,
        visible=visible,
        kind=draw(st.sampled_from((gaussian, channel_offsets, heavy_tails, ties))),
        dtype=build.dtype,
        layout=draw(st.sampled_from(LAYOUTS)),
        room=draw(st.integers(0, 2)),
        block=block,
        refine=build.refine,
        seed=draw(seeds()),
    )


@dataclass(frozen=True)
class Step:
    """A `Retrieval` with its tensors, those of the kernels on the device."""

    case: Retrieval
    shape: Any
    scratch: Any
    counters: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor
    state: list[Tensor]
    sink_logits: Tensor | None
    device: torch.device

    def score(self) -> None:
        from fierpatch.kernels import retrieve
        from fierpatch.kernels.logits import Logits

        case = self.case
        axes = case.shape
        visible = case.visible
        if visible is not None:
            sizes = (visible.shape[0], 1, axes.num_queries, axes.length)
            visible = lay_out(visible.to(self.device), case.layout).expand(sizes)
        retrieve.score(
            self.shape,
            self.scratch,
            lay_out(self.query.to(self.device), case.layout),
            [tensor.to(self.device) for tensor in self.state],
            self.counters,
            Logits(case.scale, case.softcap),
            visible,
        )

    def select(self) -> Tensor:
        """The lists, or those of candidates: int64 ``[B, H or Hq, T, n]``."""
        from fierpatch.kernels import retrieve

        case, shape = self.case, self.shape
        sink = None if self.sink_logits is None else self.sink_logits.to(self.device)
        found = retrieve.select(
            shape,
            self.scratch,
            self.counters,
            sinks=case.sinks,
            recent=case.recent,
            sink_logits=sink,
            has_mask=case.visible is not None,
        )
        return found.view(shape.batch_size, shape.num_lists, shape.num_queries, -1).long()

    def score_candidates(self) -> None:
        from fierpatch.kernels import retrieve
        from fierpatch.kernels.logits import Logits

        case = self.case
        retrieve.score_candidates(
            self.shape,
            self.scratch,
            lay_out(self.query.to(self.device), case.layout),
            [tensor.to(self.device) for tensor in self.state],
            Logits(case.scale, case.softcap),
            self.keys.to(self.device),
        )

    def select_candidates(self) -> Tensor:
        from fierpatch.kernels import retrieve

        case = self.case
        sink = None if self.sink_logits is None else self.sink_logits.to(self.device)
        return retrieve.select_candidates(
            self.shape, self.scratch, sinks=case.sinks, recent=case.recent, sink_logits=sink
        )

    def weights(self) -> tuple[Tensor, Tensor]:
        """What `score` left of each token: float64 ``[B, H, T, S, G]``, and whether anything."""
        axes = self.case.shape
        sizes = (axes.batch_size, axes.num_kv_heads, axes.num_queries, -1, axes.num_groups)
        bits = self.scratch.weight.view(sizes)[:, :, :, : axes.length].cpu().int()
        return (bits << 15).view(torch.float32).double(), bits > 0


def make_step(case: Retrieval, device: torch.device, *, is_indexed: bool = True) -> Step:
    """The tensors of a step; without keys, values and index unless they are wanted."""
    from fierpatch.kernels import append
    from fierpatch.kernels import shape as sizes

    axes, generator = case.shape, torch.Generator().manual_seed(case.seed)
    tiles = num_tiles(axes.length) + case.room
    stored = axes.length if is_indexed else 0
    keys = case.kind((*axes.keys[:2], stored, axes.head_dim), generator).to(case.dtype)
    values = gaussian((*axes.keys[:2], stored, axes.value_head_dim), generator).to(case.dtype)
    room = tiles * TILE_SIZE if is_indexed else 0
    state = case.index.allocate(*axes.keys[:2], room, keys.device)
    set_balance(case.index, state, generator)
    case.index.append(state, keys, 0, stored)
    num_heads = axes.query[1]
    # For drawn logits, about what a thousand `gentle` ones weigh: then it matters to each head.
    middle = 0.0 if is_indexed else 9.0
    shape = sizes.Shape(
        case.index, axes.batch_size, axes.num_kv_heads, axes.num_groups, axes.num_queries,
        tiles, case.budget, case.per_query_head, case.block, case.refine,
    )  # fmt: skip
    counters = append.new_counters(device)
    counters[:2] = axes.length
    return Step(
        case=case,
        shape=shape,
        scratch=sizes.Scratch(shape, device),
        counters=counters,
        query=gaussian(axes.query, generator).to(case.dtype),
        keys=keys,
        values=values,
        state=state,
        sink_logits=middle + torch.randn(num_heads, generator=generator) if case.has_sink else None,
        device=device,
    )
