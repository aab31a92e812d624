"""The operators of one layer's cache behind one protocol, and which backend runs them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fierpatch.config import FierConfig
from fierpatch.errors import BackendError, MissingDependencyError
from fierpatch.hot_set import HotSet
from fierpatch.index import KeyIndex
from fierpatch.ops.library import named_index  # and registers torch.ops.fierpatch
from fierpatch.query_estimate import QueryEstimate

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 256


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


def index_arguments(config: FierConfig) -> tuple[str, int, int, int, int]:
    """Name, bits, group_size, seed and refine_bits of the index, as the library ops take them."""
    return config.index, config.bits, config.index_group_size, config.seed, config.code_bits


def ahead_arguments(config: FierConfig, estimate: QueryEstimate) -> tuple[Any, ...]:
    """The settings of `Operators.place_ahead`, as the library ops take them.

    The usual scale of the logits, without a cap: an estimate needs no more.
    """
    return (
        *index_arguments(config), config.budget, config.sinks, config.recent,
        config.per_query_head, estimate.size[3] ** -0.5, config.refine,
    )  # fmt: skip


def layer_index(config: FierConfig, head_dim: int) -> KeyIndex:
    """The index that the settings ask for, for keys of `head_dim` channels."""
    return named_index(*index_arguments(config), head_dim)


def choose_backend(config: FierConfig, key: Tensor, value: Tensor) -> str:
    """Which backend runs a layer with such keys and values: ``"reference"`` or ``"triton"``.

    ``"auto"`` is Triton on a CUDA device where it is installed and has kernels for these keys, and
    so is ``"flex"``, of all but the attention.

    Raises:
        BackendError: ``"triton"`` was asked for and cannot run.
        MissingDependencyError: or is not installed.
    """
    if config.backend == "reference":
        return "reference"
    is_asked = config.backend == "triton"
    if not is_asked and key.device.type != "cuda":
        return "reference"
    if find_spec("triton") is None:
        if is_asked:
            raise MissingDependencyError(
                'backend="triton" needs the package triton, which is not installed: pip install '
                'fierpatch[triton], or use backend="reference"'
            )
        return "reference"
    head_dim = max(key.shape[3], value.shape[3])
    problem = ""
    if key.dtype not in _KERNEL_DTYPES:
        problem = f"keys of {key.dtype}: it has kernels for bfloat16, float16 and float32"
    elif value.dtype != key.dtype:
        problem = f"keys of {key.dtype} and values of {value.dtype}: it wants one dtype"
    elif head_dim > _MAX_HEAD_DIM:
        problem = f"a head_dim of {head_dim}: its kernels end at {_MAX_HEAD_DIM}"
    if problem and is_asked:
        raise BackendError(f'backend="triton" cannot run on {problem}; use backend="reference"')
    return "reference" if problem else "triton"
