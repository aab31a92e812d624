"""Fetching what a layer will need, surely or probably, while the layer before it works."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from fierpatch.cache.buffers import LayerBuffers
from fierpatch.query_estimate import QueryEstimate


class Prefetch(LayerBuffers):
    """What of `fierpatch.cache.LayerCache` runs ahead of a step. No result depends on it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.next: weakref.ref[Prefetch] | None = None  # the model's next layer, if it is ours
        self.has_previous = False  # whether it has one before it that is ours
        self.fetches_on_call = False  # by `fetch_placed`, and not when the layer before attended
        self._estimate: QueryEstimate | None = None  # of the next one, to be fetched for
        self._started: _Started | None = None

    def prefetch(self, estimate: QueryEstimate) -> None:
        """Fetch what the next step will probably select; no result depends on it.

        It selects when the layer before this one stores its token, while small kernels leave the
        device's memory idle, and fetches when that has attended, or at `fetch_placed` where
        ``fetches_on_call``. It does not wait for a layer that is none of ours.

        Args:
            estimate: of the next step's query.
        """
        if self.hot is None:
            return
        self._estimate = estimate
        if not self.has_previous:
            self._place_ahead(None)
            if not self.fetches_on_call:
                self.fetch_placed(None)

    @property
    def expected(self) -> QueryEstimate | None:
        """The estimate by which something is being fetched for this step."""
        return None if self._started is None else self._started.estimate

    def fetch_placed(self, before: Tensor | None) -> None:
        """Start to fetch what `prefetch` gave a place, if anything, before what reads this.

        Behind what the layer before reads from the host itself.
        """
        started = self._started
        if started is not None and not started.is_fetching and self.hot is not None:
            self.operators.fetch_ahead(self._allocated.rows, self.hot, started.kept, before)
            self._started = started._replace(is_fetching=True)

    def _have_next_read(self, stored: int, num_new: int) -> None:
        """Have the next layer read what is stored for the prompt that this one was given."""
        following = self._following
        if stored and following is not None and following.is_allocated:
            following._allocated.read_ahead(stored, num_new)

    def _have_next_place(self) -> None:
        """Start the next layer's placement, before this one's counters change."""
        following = self._following
        if following is not None:
            following._place_ahead(self.counters)

    def _have_next_fetch(self, before: Tensor | None) -> None:
        """Start the next layer's fetch, unless it is to be called for."""
        following = self._following
        if following is not None and not following.fetches_on_call:
            following.fetch_placed(before)

    @property
    def _following(self) -> Prefetch | None:
        """The next layer, if it is ours."""
        return self.next() if self.next is not None else None

    def _place_ahead(self, before: Tensor | None) -> None:
        """Start to select and place by the estimate, if there is one, before what changes this."""
        estimate = self._estimate
        self._join()
        if estimate is not None and self.hot is not None:
            rows = self._allocated.rows
            kept = self.operators.place_ahead(
                estimate, rows, self.state, self.counters, self.hot, before
            )
            self._started = _Started(estimate, kept)

    def _await_placed(self, after: Tensor) -> None:
        """Wait until what was started has read what a new token changes."""
        if self._started is not None:
            self.operators.await_placed(self.counters, self._started.kept, after)

    def _join(self, after: Tensor | None = None) -> None:
        """Wait for what was started, before anything of it is used or changed."""
        self._estimate = None
        self.fetch_placed(None)  # what has a place has to come
        if self._started is not None and self.hot is not None:
            started, self._started = self._started, None
            after = self.counters if after is None else after
            self.operators.await_fetched(self.hot, started.kept, after)


class _Started(NamedTuple):
    """What a layer fetches ahead."""

    estimate: QueryEstimate
    kept: list[Tensor]  # what `Operators.place_ahead` gave
    is_fetching: bool = False
