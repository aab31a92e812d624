"""The operators of a layer in Triton kernels: no host read and fixed addresses in a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import fierpatch.ops.kernel_library  # noqa: F401  (registers torch.ops.fierpatch)
from fierpatch.config import FierConfig
from fierpatch.errors import BackendError
from fierpatch.hot_set import HotSet
from fierpatch.index import KeyIndex
from fierpatch.kernels import append as appending
from fierpatch.kernels import attention, retrieve
from fierpatch.kernels.launch import check_device, is_interpreted
from fierpatch.kernels.logits import Logits
from fierpatch.kernels.shape import Scratch, Shape
from fierpatch.ops.arguments import ahead_arguments, index_arguments, layer_index
from fierpatch.ops.progress import calibrate_prompt
from fierpatch.query_estimate import QueryEstimate
from fierpatch.rows import split

_MOST_GROUPS = 128  # query heads a KV head, for lists of their own


@dataclass
class Workspace:
    """What the kernels of all layers of one cache write for each other.

    Eager steps reuse it; in a compiled one the allocator of the graph does. Memory that a captured
    step may write to is not given up while the cache lives.
    """

    scratch: dict[Shape, Scratch] = field(default_factory=dict)
    partials: dict[int, Tensor] = field(default_factory=dict)

    def scratch_of(self, shape: Shape, device: torch.device) -> Scratch:
        """The intermediate results of a retrieval; forgets those of a cache that has grown since.

        A cache that grows cannot be captured, and one that is captured does not grow.
        """
        found = self.scratch.get(shape)
        if found is None:
            with torch.inference_mode(False):
                found = Scratch(shape, device)
            kept = {key: one for key, one in self.scratch.items() if key.tiles == shape.tiles}
            self.scratch = {**kept, shape: found}
        return found

    def partial_of(self, size: int, device: torch.device) -> Tensor:
        """Room for `size` float32 numbers."""
        found = self.partials.get(size)
        if found is None:
            with torch.inference_mode(False):
                found = self.partials[size] = torch.empty(size, device=device)
        return found


class KernelOperators:
    """See `fierpatch.ops.operators.Operators`.

    Args:
        config: the settings of the patch.
        key: the first keys stored, ``[B, H, T, D]``.
        workspace: shared by the layers of a cache that live on one device.

    Raises:
        BackendError: kernels cannot run on these tensors.
    """

    name = "triton"

    def __init__(self, config: FierConfig, key: Tensor, workspace: Workspace) -> None:
        check_device(key.device)
        if is_interpreted and key.dtype == torch.bfloat16:
            raise BackendError(
                "Triton's interpreter computes bfloat16 wrongly: use float16 or float32, or unset "
                "TRITON_INTERPRET"
            )
        self.config = config
        self.index: KeyIndex = layer_index(config, key.shape[3])
        self.workspace = workspace
        self._shape: Shape | None = None
        # Zeros, by which the programs of a list find out which of them is last.
        self.arrivals = torch.zeros(0, dtype=torch.int32, device=key.device)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """See `Operators`."""
        return (self.arrivals,)

    def settle(self, keys: Tensor) -> None:
        """See `Operators`."""
        lists = keys.shape[0] * keys.shape[1] * (_MOST_GROUPS if self.config.per_query_head else 1)
        if self.arrivals.numel() < lists * self.config.max_query_length:
            with torch.inference_mode(False):
                self.arrivals = self.arrivals.new_zeros(lists * self.config.max_query_length)

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
        if torch.compiler.is_compiling():
            torch.ops.fierpatch.triton_append.default(
                key, value, rows, state, counters, is_prompt, *index_arguments(self.config)
            )
            return
        index = self.index if state and not is_prompt else None
        appending.append(index, key, value, *split(rows, key.shape[3]), state, counters)

    def index_prompt(
        self,
        query: Tensor,
        keys: Tensor,
        state: list[Tensor],
        counters: Tensor,
        progress: list[int] | None,
    ) -> list[int] | None:
        """See `Operators`. Reads the counters where need be, for a prompt is no step."""
        if torch.compiler.is_compiling():
            torch.ops.fierpatch.index_prompt.default(
                query, keys, state, counters, *index_arguments(self.config)
            )
            return None
        progress = calibrate_prompt(
            self.index, query, keys, state, progress or counters.tolist()[:3]
        )
        stored, indexed, calibrated = progress
        appending.index_range(self.index, keys, state, indexed, stored)
        counters[1].fill_(stored)
        counters[2].fill_(calibrated)
        return [stored, stored, calibrated]

    def index_range(self, keys: Tensor, state: list[Tensor], start: int, stop: int) -> None:
        """See `Operators`."""
        appending.index_range(self.index, keys, state, start, stop)

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
        candidate_keys = rows[0] if config.refines_by_keys else None
        if torch.compiler.is_compiling():
            token_indices: Tensor = torch.ops.fierpatch.triton_retrieve.default(
                query, state, counters, visible, sink_logits,
                *index_arguments(self.config), config.budget, config.sinks, config.recent,
                config.per_query_head, scale, softcap, config.refine, candidate_keys,
            )  # fmt: skip
            return token_indices
        shape = self._shape_of(query, state[0])
        return retrieve.retrieve(
            shape, self.workspace.scratch_of(shape, query.device), query, state, counters,
            Logits(scale, softcap), visible, sinks=config.sinks, recent=config.recent,
            sink_logits=sink_logits, keys=candidate_keys,
        )  # fmt: skip

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
        if torch.compiler.is_compiling():
            rest = (token_indices, counters, self.arrivals, sink_logits, scale, softcap)
            output: Tensor
            if hot is None:
                output = torch.ops.fierpatch.triton_attend.default(query, rows, *rest)
            else:
                output = torch.ops.fierpatch.triton_attend_hot.default(
                    query, rows[0], hot.tensors, *rest
                )
            return output
        return attention.gather_attention(
            query, *split(rows, query.shape[3]), token_indices, scale=scale, softcap=softcap,
            sink_logits=sink_logits, counters=counters, arrivals=self.arrivals,
            allocate=self._allocate, hot=hot,
        )  # fmt: skip

    def place_ahead(
        self,
        estimate: QueryEstimate,
        rows: list[Tensor],
        state: list[Tensor],
        counters: Tensor,
        hot: HotSet,
        before: Tensor | None,
    ) -> list[Tensor]:
        """See `Operators`. On a stream of its own."""
        settings = ahead_arguments(self.config, estimate)
        kept = torch.ops.fierpatch.triton_place_ahead.default(
            *estimate.arguments, hot.tensors, state, counters, before, *settings
        )
        return [*kept, *estimate.tensors]

    def fetch_ahead(
        self, rows: list[Tensor], hot: HotSet, kept: list[Tensor], before: Tensor | None
    ) -> None:
        """See `Operators`. On that stream."""
        torch.ops.fierpatch.triton_fetch_ahead.default(rows[0], hot.tensors, *kept[:3], before)

    def await_placed(self, counters: Tensor, kept: list[Tensor], after: Tensor) -> None:
        """See `Operators`."""
        torch.ops.fierpatch.triton_await_placed.default(counters, kept, after)

    def await_fetched(self, hot: HotSet, kept: list[Tensor], after: Tensor) -> None:
        """See `Operators`."""
        torch.ops.fierpatch.triton_await_fetched.default(hot.tally, kept, after)

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
        if torch.compiler.is_compiling():
            output: Tensor = torch.ops.fierpatch.triton_attend_all.default(
                query, rows, counters, self.arrivals, visible, sink_logits, scale, softcap
            )
            return output
        return attention.dense_attention(
            query, *split(rows, query.shape[3]), counters, visible, scale=scale, softcap=softcap,
            sink_logits=sink_logits, arrivals=self.arrivals,
            allocate=self._allocate,
        )  # fmt: skip

    def _allocate(self, size: int) -> Tensor:
        """Room for what the programs of an attention write for each other."""
        return self.workspace.partial_of(size, self.arrivals.device)

    def _shape_of(self, query: Tensor, planes: Tensor) -> Shape:
        """The shape of a retrieval, the last one again where nothing has changed."""
        shape = self._shape
        batch_size, _, num_queries, _ = query.shape
        if (
            shape is None
            or shape.tiles != planes.shape[2]
            or shape.num_queries != num_queries
            or shape.batch_size != batch_size
        ):
            config = self.config
            shape = self._shape = Shape.of(
                self.index,
                query.shape,
                planes,
                budget=config.budget,
                per_query_head=config.per_query_head,
                refine=config.refine,
            )
        return shape
