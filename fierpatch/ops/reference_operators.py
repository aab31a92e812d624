"""The operators of the specification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fierpatch.config import FierConfig
from fierpatch.hot_set import HotSet
from fierpatch.ops.arguments import ahead_arguments, index_arguments, layer_index
from fierpatch.query_estimate import QueryEstimate


@dataclass(frozen=True)
class ReferenceOperators:
    """The specification, in plain PyTorch on any device; reads lengths on the host.

    Args:
        config: the settings of the patch.
    """

    config: FierConfig
    name: ClassVar[str] = "reference"
    buffers: ClassVar[tuple[Tensor, ...]] = ()

    def settle(self, keys: Tensor) -> None:
        """See `Operators`."""

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
        torch.ops.fierpatch.append.default(
            key, value, rows, state, counters, is_prompt, *index_arguments(self.config)
        )

    def index_prompt(
        self,
        query: Tensor,
        keys: Tensor,
        state: list[Tensor],
        counters: Tensor,
        progress: list[int] | None,
    ) -> list[int] | None:
        """See `Operators`."""
        torch.ops.fierpatch.index_prompt.default(
            query, keys, state, counters, *index_arguments(self.config)
        )
        return None if torch.compiler.is_compiling() else counters.tolist()[:3]

    def index_range(self, keys: Tensor, state: list[Tensor], start: int, stop: int) -> None:
        """See `Operators`."""
        layer_index(self.config, keys.shape[3]).append(state, keys, start, stop)

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
        config = self.config
        token_indices: Tensor = torch.ops.fierpatch.retrieve.default(
            query, state, counters, visible, sink_logits, *index_arguments(config), config.budget,
            config.sinks, config.recent, config.per_query_head, scale, softcap,
            config.refine, rows[0] if config.refines_by_keys else None,
        )  # fmt: skip
        return token_indices

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
        """See `Operators`."""
        rest = (token_indices, sink_logits, scale, softcap)
        output: Tensor
        if hot is None:
            output = torch.ops.fierpatch.attend.default(query, rows, *rest)
        else:
            output = torch.ops.fierpatch.attend_hot.default(query, rows[0], hot.tensors, *rest)
        return output

    def place_ahead(
        self,
        estimate: QueryEstimate,
        rows: list[Tensor],
        state: list[Tensor],
        counters: Tensor,
        hot: HotSet,
        before: Tensor | None,
    ) -> list[Tensor]:
        """See `Operators`. Does it at once, and fetches too."""
        rest = (rows[0], hot.tensors, state, counters, *ahead_arguments(self.config, estimate))
        torch.ops.fierpatch.fetch_ahead.default(*estimate.arguments, *rest)
        return []

    def fetch_ahead(
        self, rows: list[Tensor], hot: HotSet, kept: list[Tensor], before: Tensor | None
    ) -> None:
        """See `Operators`."""

    def await_placed(self, counters: Tensor, kept: list[Tensor], after: Tensor) -> None:
        """See `Operators`."""

    def await_fetched(self, hot: HotSet, kept: list[Tensor], after: Tensor) -> None:
        """See `Operators`."""

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
        return None
