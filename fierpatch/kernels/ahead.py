"""Fetching ahead what a layer will probably select, beside what its device computes meanwhile."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fierpatch.hot_set import HotSet
from fierpatch.kernels import residency, retrieve
from fierpatch.kernels.launch import is_interpreted
from fierpatch.kernels.logits import Logits
from fierpatch.kernels.project import project
from fierpatch.kernels.shape import Scratch, Shape
from fierpatch.query_estimate import QueryEstimate


def fetch_ahead(
    shape: Shape,
    hot: HotSet,
    paired: Tensor,
    estimate: QueryEstimate,
    state: list[Tensor],
    counters: Tensor,
    logits: Logits,
    *,
    sinks: int,
    recent: int,
) -> Tensor:
    """Select by an estimate of the next step's query, and fetch what of it is missing.

    Args:
        shape: of the retrieval.
        hot, paired: the layer's, whose tokens may not be attended before `join`.
        estimate: of the query, which is computed beside all else too.
        state, counters: the layer's, which nothing may change before `await_placed`.

    Returns:
        Memory that, like the estimate's, must not be freed before `await_placed`.
    """
    device = estimate.source.device
    # Of the stream that goes on, whose allocator would give it away again without a wait.
    room = estimate.source.new_empty(Scratch.nbytes_of(shape), dtype=torch.uint8)
    scratch = Scratch.within(shape, room)

    def select() -> tuple[Tensor, Tensor]:
        # A selection wants a token at least; none is placed that is not there.
        lengths = counters.clamp(min=1)
        chosen = retrieve.retrieve(
            shape,
            scratch,
            estimate.query(project),
            state,
            lengths,
            logits,
            sinks=sinks,
            recent=recent,
        )
        return residency.place(hot, chosen, counters), chosen

    if is_interpreted:
        residency.fetch(hot, *select(), paired)
        return room
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        places, chosen = select()
        _placed(device).record(side)
        residency.fetch(hot, places, chosen, paired)
    return room


def await_placed(like: Tensor) -> None:
    """Let the current stream of a tensor's device wait until what is fetched ahead has its place.

    The fetch itself may go on: tokens that are stored do not change.
    """
    if not is_interpreted:
        torch.cuda.current_stream(like.device).wait_event(_placed(like.device))


def join(like: Tensor) -> None:
    """Let the current stream of a tensor's device wait for what was fetched ahead."""
    if not is_interpreted:
        torch.cuda.current_stream(like.device).wait_stream(side_stream(like.device))


@cache
def _placed(device: torch.device) -> torch.cuda.Event:
    """Recorded on the side stream of a device; of the last fetch, which those before it precede."""
    return torch.cuda.Event()


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where a device fetches ahead."""
    return torch.cuda.Stream(device, priority=-1)
