"""The operators of a layer whose attention is FlexAttention's, and all else another backend's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fierpatch.config import FierConfig
from fierpatch.flex.attention import Mode, selected_attention
from fierpatch.hot_set import HotSet
from fierpatch.ops.operators import Operators
from fierpatch.query_estimate import QueryEstimate

MODE: Mode = "compact"  # how FlexAttention reads the rows: the faster one, see `bench.flex`


@dataclass(frozen=True)
class FlexOperators:
    """See `fierpatch.ops.operators.Operators`.

    Args:
        config: the settings of the patch.
        base: stores, indexes and selects, and attends where a layer is dense.
    """

    config: FierConfig
    base: Operators
    name: ClassVar[str] = "flex"

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """See `Operators`."""
        return self.base.buffers

    def settle(self, keys: Tensor) -> None:
        """See `Operators`."""
        self.base.settle(keys)

    def append(
        self,
        key: Tensor,
        value: Tensor,
        rows: list[Tensor],
        state: list[Tensor],
        counters: Tensor,
        is_prompt: bool,
    ) -> None:
        """See `Operators`."""
        self.base.append(key, value, rows, state, counters, is_prompt)

    def index_prompt(
        self,
        query: Tensor,
        keys: Tensor,
        state: list[Tensor],
        counters: Tensor,
        progress: list[int] | None,
    ) -> list[int] | None:
        """See `Operators`."""
        return self.base.index_prompt(query, keys, state, counters, progress)

    def index_range(self, keys: Tensor, state: list[Tensor], start: int, stop: int) -> None:
        """See `Operators`."""
        self.base.index_range(keys, state, start, stop)

    def retrieve(
        self,
        query: Tensor,
        rows: list[Tensor],
        state: list[Tensor],
        counters: Tensor,
        visible: Tensor | None,
        sink_logits: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor:
        """See `Operators`."""
        return self.base.retrieve(
            query, rows, state, counters, visible, sink_logits, scale, softcap
        )

    def attend(
        self,
        query: Tensor,
        rows: list[Tensor],
        token_indices: Tensor,
        counters: Tensor,
        sink_logits: Tensor | None,
        scale: float,
        softcap: float,
        hot: HotSet | None = None,
    ) -> Tensor:
        """See `Operators`. Never by way of a hot set, which `FierConfig` refuses."""
        assert hot is None, "an offloaded layer"
        keys, values = rows
        output, _ = selected_attention(
            query,
            keys,
            values,
            token_indices,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            mode=MODE,
            is_ascending=True,
        )
        return output.transpose(1, 2).contiguous()

    def place_ahead(
        self,
        estimate: QueryEstimate,
        rows: list[Tensor],
        state: list[Tensor],
        counters: Tensor,
        hot: HotSet,
        before: Tensor | None,
    ) -> list[Tensor]:
        """See `Operators`."""
        return self.base.place_ahead(estimate, rows, state, counters, hot, before)

    def fetch_ahead(
        self, rows: list[Tensor], hot: HotSet, kept: list[Tensor], before: Tensor | None
    ) -> None:
        """See `Operators`."""
        self.base.fetch_ahead(rows, hot, kept, before)

    def await_placed(self, counters: Tensor, kept: list[Tensor], after: Tensor) -> None:
        """See `Operators`."""
        self.base.await_placed(counters, kept, after)

    def await_fetched(self, hot: HotSet, kept: list[Tensor], after: Tensor) -> None:
        """See `Operators`."""
        self.base.await_fetched(hot, kept, after)

    def attend_all(
        self,
        query: Tensor,
        rows: list[Tensor],
        counters: Tensor,
        visible: Tensor | None,
        sink_logits: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor | None:
        """See `Operators`."""
        return self.base.attend_all(query, rows, counters, visible, sink_logits, scale, softcap)
