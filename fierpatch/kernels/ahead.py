"""Fetching ahead what a layer will probably select, beside what its device computes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fierpatch.hot_set import HotSet
from fierpatch.kernels import residency, retrieve
from fierpatch.kernels.launch import is_interpreted
from fierpatch.kernels.logits import Logits
from fierpatch.kernels.project import project
from fierpatch.kernels.shape import Scratch, Shape
from fierpatch.query_estimate import QueryEstimate


def place_ahead(
    shape: Shape,
    hot: HotSet,
    estimate: QueryEstimate,
    state: list[Tensor],
    counters: Tensor,
    logits: Logits,
    *,
    sinks: int,
    recent: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select by an estimate of the next step's query, and give what of it is missing a place.

    Nothing is selected where the last step says that it would not pay; that is known on the device
    alone, so that kernels are launched anyway, and end at once.

    Args:
        shape: of the retrieval.
        hot: the layer's, which may not be used before `fetch_ahead` and `await_fetched`.
        estimate: of the query, which is computed beside all else too.
        state, counters: the layer's, which nothing may change before `await_placed`.

    Returns:
        Tokens, places and a length, for `fetch_ahead`, none of which must be freed before
        `await_fetched`, and memory that like the estimate's must not be before `await_placed`.
    """
    device = estimate.source.device
    # Of the stream that goes on, whose allocator would give it away again without a wait.
    room = estimate.source.new_empty(Scratch.nbytes_of(shape), dtype=torch.uint8)
    lengths = counters.new_empty(4)
    scratch = Scratch.within(shape, room)
    with _beside(_selection_stream, device):
        # Candidates that nobody chose would be read anywhere.
        shortest = 1 if shape.refine else 0
        length, placed_length = residency.lengths_ahead(
            hot, shape.width, counters, lengths, shortest=shortest
        )
        chosen = retrieve.retrieve(
            shape,
            scratch,
            estimate.query(partial(project, length=placed_length)),
            state,
            length,
            logits,
            sinks=sinks,
            recent=recent,
            follows_append=False,
        )
        placed = residency.place(hot, chosen, placed_length)
        _record(_placed, device)
    return chosen, placed, placed_length, room


def fetch_ahead(
    hot: HotSet, paired: Tensor, chosen: Tensor, placed: Tensor, length: Tensor
) -> None:
    """Fetch what `place_ahead` placed.

    Apart from it, so that it starts behind what the layer at work reads from the host itself.

    Args:
        paired: the layer's rows.
        chosen, placed, length: what `place_ahead` gave.
    """
    with _beside(side_stream, chosen.device):
        _await(_placed, chosen.device)
        residency.fetch(hot, placed, chosen, length, paired)
        _record(_fetched, chosen.device)


def await_placed(like: Tensor) -> None:
    """Let the current stream of a tensor's device wait until what is fetched ahead has its place.

    The fetch itself may go on: tokens that are stored do not change.
    """
    _await(_placed, like.device)


def await_fetched(like: Tensor) -> None:
    """Let the current stream of a tensor's device wait for what was fetched ahead."""
    _await(_fetched, like.device)


_Of = Callable[[torch.device], Any]  # a stream or an event of a device


@contextmanager
def _beside(stream: _Of, device: torch.device) -> Iterator[None]:
    """Launch there what comes after all that was launched so far."""
    if is_interpreted:
        yield
        return
    stream(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream(device)):
        yield


def _record(event: _Of, device: torch.device) -> None:
    if not is_interpreted:
        event(device).record(torch.cuda.current_stream(device))


def _await(event: _Of, device: torch.device) -> None:
    if not is_interpreted:
        torch.cuda.current_stream(device).wait_event(event(device))


# Events of the last layer, which on their streams those before it precede.
@cache
def _placed(device: torch.device) -> torch.cuda.Event:
    return torch.cuda.Event()


@cache
def _fetched(device: torch.device) -> torch.cuda.Event:
    return torch.cuda.Event()


@cache
def _selection_stream(device: torch.device) -> torch.cuda.Stream:
    """Where a device selects ahead: of no higher priority than the step, as its kernels wait."""
    return torch.cuda.Stream(device)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where a device fetches ahead."""
    return torch.cuda.Stream(device, priority=-1)
