"""The operators of one layer's cache behind one protocol."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fierpatch.hot_set import HotSet
from fierpatch.query_estimate import QueryEstimate


class Operators(Protocol):
    """What a layer's cache does with its tensors.

    Rows are keys ``[B, H, C, D]`` and values ``[B, H, C, Dv]``, or paired rows alone, see
    `fierpatch.rows`. The state is the index's; counters are int64 ``[4]``: tokens stored, tokens
    indexed, tokens at the last calibration, and one that kernels use.
    """

    @property
    def name(self) -> str:
        """The backend: ``"reference"``, ``"triton"`` or ``"flex"``."""

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors of the operators' own that a compiled step writes to."""

    def settle(self, keys: Tensor) -> None:
        """Make room for a batch of such ``keys [B, H, C, D]``."""

    def append(
        self,
        key: Tensor,
        value: Tensor,
        rows: list[Tensor],
        state: list[Tensor],
        counters: Tensor,
        is_prompt: bool,
    ) -> None:
        """Store new tokens and, unless they are a prompt's, index all that is not indexed yet."""

    def index_prompt(
        self,
        query: Tensor,
        keys: Tensor,
        state: list[Tensor],
        counters: Tensor,
        progress: list[int] | None,
    ) -> list[int] | None:
        """Index the tokens stored, calibrated by the prompt's queries.

        Args:
            progress: the first three counters where the host knows them.

        Returns:
            What they are now, or None while compiling.
        """

    def index_range(self, keys: Tensor, state: list[Tensor], start: int, stop: int) -> None:
        """Index tokens ``start .. stop`` again."""

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
        """The tokens to attend: int64 ``[B, H or Hq, T, min(budget, C)]``, ascending, then -1."""

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
        """Attention over what `retrieve` chose: ``[B, T, Hq, Dv]``.

        Args:
            hot: of an offloaded layer, for one query; what is missing there is fetched.
        """

    def place_ahead(
        self,
        estimate: QueryEstimate,
        rows: list[Tensor],
        state: list[Tensor],
        counters: Tensor,
        hot: HotSet,
        before: Tensor | None,
    ) -> list[Tensor]:
        """Start to select by an estimate of the next query, and to place what is missing.

        Args:
            before: something whose readers the compiler has to leave behind the start.

        Returns:
            What the three below have to be given, before anything of the layer changes.
        """

    def fetch_ahead(
        self, rows: list[Tensor], hot: HotSet, kept: list[Tensor], before: Tensor | None
    ) -> None:
        """Start to fetch what was placed.

        Args:
            kept: what `place_ahead` returned.
            before: as there.
        """

    def await_placed(self, counters: Tensor, kept: list[Tensor], after: Tensor) -> None:
        """Wait until `place_ahead` has read index and counters, which may change then.

        Args:
            kept: what it returned.
            after: something that is to be computed before the wait.
        """

    def await_fetched(self, hot: HotSet, kept: list[Tensor], after: Tensor) -> None:
        """Wait for all that `fetch_ahead` started; arguments as in `await_placed`.

        Args:
            after: whose readers come after the wait, too.
        """

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
        """Attention over all tokens stored, or None to leave it to the model's own."""
