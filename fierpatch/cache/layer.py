"""One layer's cache: K and V in buckets, the key index beside them, and how far both have come."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from fierpatch.cache.checks import check_fit, check_positions
from fierpatch.cache.facts import LayerFacts, Observer
from fierpatch.cache.shared import Shared
from fierpatch.config import FierConfig
from fierpatch.index import KeyIndex, map_batch, resize
from fierpatch.ops.library import check_capacity
from fierpatch.ops.operators import Operators, ReferenceOperators, layer_index

BUCKET_SIZE = 512  # tokens; a tile of the index

MARK = "_fierpatch_layer"  # the attribute by which returned keys and values name their layer


class LayerCache:
    """K, V and key index of one full-attention layer.

    Growing caches allocate in buckets of 512 tokens and know their length on the host. Static ones
    have a fixed capacity, fixed addresses and counters on the device, and hand out their whole
    buffers, so that a decode step compiles into one graph.

    Args:
        config: the settings of the patch.
        capacity: tokens to make room for at first (growing) or for good (static).
        is_static: whether the capacity is fixed.
        is_dense: whether the layer keeps no index and is always attended densely.
        max_positions: tokens the model has positions for; None means no limit.
        shared: what the layers of one cache have in common; None means nothing.
    """

    def __init__(
        self,
        config: FierConfig,
        *,
        capacity: int = 0,
        is_static: bool = False,
        is_dense: bool = False,
        max_positions: int | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.config = config
        self.is_static = is_static
        self.is_dense = is_dense
        self.max_positions = max_positions
        self._shared = shared or Shared()
        self.capacity = _round_up(max(capacity, 1))
        if is_static and max_positions is not None:
            self.capacity = min(self.capacity, max_positions)
        self.observer: Observer | None = None
        self.index: KeyIndex | None = None
        self.state: list[Tensor] = []
        self.keys = self.values = torch.empty(0)  # until the first update
        # Tensors born in inference mode could not be updated outside it, in a later turn.
        with torch.inference_mode(False):
            self.counters = torch.zeros(4, dtype=torch.int64)
        # The first three counters as the host knows them: a replayed graph passes it by.
        self._progress = [0, 0, 0]
        self.operators: Operators = ReferenceOperators(config)
        self.facts = LayerFacts(self.counters)
        # What travels on the returned tensors; a strong reference would be a cycle.
        self._mark = weakref.ref(self)

    @property
    def is_allocated(self) -> bool:
        """Whether the buffers exist; the first update makes them."""
        return self.keys.ndim == 4

    @property
    def num_tokens(self) -> int:
        """Tokens stored. Reads the device where the cache is static."""
        return int(self.counters[0]) if self.is_static else self._progress[0]

    @property
    def batch_size(self) -> int:
        """Rows of the batch, or -1 before the first update."""
        return self.keys.shape[0] if self.is_allocated else -1

    def configure(self, config: FierConfig) -> None:
        """Retrieve by these settings from now on; the index's own have to stay the same."""
        self.config, self.operators = config, ReferenceOperators(config)
        if self.is_allocated:
            with torch.inference_mode(False):
                self.operators = self._shared.operators(config, self.keys, self.values)
            self._settle()

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return the keys and values to attend over.

        Args:
            key: ``[B, H, T, D]``, after RoPE.
            value: ``[B, H, T, Dv]``.

        Returns:
            The new tensors themselves at the first prompt; else all valid rows (growing) or the
            whole buffers (static). Marked with this layer.

        Raises:
            CacheMismatchError: another batch size, head count, head_dim, dtype or device than
                before.
            CapacityError: a static cache is full.
            PositionLimitError: the model has no positions for that many tokens.
        """
        num_new = key.shape[2]
        if not self.is_allocated:
            self.allocate(key, value)
        check_fit(key, value, self.keys, self.values)
        is_prompt = num_new > self.config.max_query_length
        is_first_prompt, stored = False, 0
        is_recorded = self.is_static and _is_recorded(key)
        if not self.is_static:
            stored = self._progress[0]
            is_first_prompt = is_prompt and stored == 0
            self._reserve(stored + num_new)
        elif not is_recorded:
            check_capacity(self._progress[0], num_new, self.capacity)
        self.operators.append(
            key, value, self.keys, self.values, self.state, self.counters, is_prompt
        )
        if not is_recorded:
            self._progress[0] += num_new
            if self.index is not None and not is_prompt:
                self._progress[1] = self._progress[0]
        if is_first_prompt:
            # Not views of the caller's tensors, whose owner may go on to use them elsewhere.
            keys, values = key[:], value[:]
        elif self.is_static:
            keys, values = self.keys[:], self.values[:]
        else:
            stop = stored + num_new
            keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        setattr(keys, MARK, self._mark)
        setattr(values, MARK, self._mark)
        return keys, values

    def index_prompt(self, query: Tensor) -> None:
        """Index the prompt just stored, calibrated by its own ``query [B, Hq, T, D]``."""
        known = None if self.is_static else self._progress
        progress = self.operators.index_prompt(query, self.keys, self.state, self.counters, known)
        if progress is not None:
            self._progress = progress

    def attend(
        self,
        query: Tensor,
        *,
        visible: Tensor | None,
        scale: float,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> Tensor | None:
        """Attention of the newest tokens: retrieval, or over all of them where the layer is dense.

        Args:
            query: ``[B, Hq, T, D]``.
            visible: bool ``[B, 1, T, stored or capacity]``; None means causal.
            scale: multiplies ``q . k``.
            softcap: where positive, caps the logits as in Gemma 2.
            sink_logits: ``[Hq]``, a logit a head without a token, as in GPT-OSS.

        Returns:
            ``[B, T, Hq, Dv]``, or None where a dense layer is left to the model's own attention.
        """
        if self.is_dense:
            return self.operators.attend_all(
                query, self.keys, self.values, self.counters, visible, sink_logits, scale, softcap
            )
        output, token_indices = self.operators.attend(
            query,
            self.keys,
            self.values,
            self.state,
            self.counters,
            visible,
            sink_logits,
            scale,
            softcap,
        )
        if self.observer is not None:
            self.observer(self, query, token_indices, visible, scale, softcap)
        return output

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Allocate for tensors shaped, typed and placed like these, whatever their length.

        Raises:
            BackendError: the backend asked for cannot run on them.
        """
        batch_size, num_kv_heads, num_new, head_dim = key.shape
        if not self.is_static:
            check_positions(num_new, self.max_positions)
            self.capacity = max(self.capacity, _round_up(num_new))
        with torch.inference_mode(False):
            self.operators = self._shared.operators(self.config, key, value)
            self.keys = key.new_zeros((batch_size, num_kv_heads, self.capacity, head_dim))
            self.values = value.new_zeros((batch_size, num_kv_heads, self.capacity, value.shape[3]))
            if not self.is_dense:
                self.index = layer_index(self.config, head_dim)
                state = self.index.allocate(batch_size, num_kv_heads, self.capacity, key.device)
                own = len(state) - self.index.num_constants
                shared = self._shared.constants.setdefault((self.index, key.device), state[own:])
                self.state = state[:own] + shared
            if self.is_static or self.operators.name != "reference":
                self.counters = self.counters.to(key.device, copy=True)
        self._settle()

    def crop(self, num_removed: int) -> None:
        """Forget the newest `num_removed` tokens."""
        stored, indexed, calibrated = self._read_progress()
        kept = max(stored - int(num_removed), 0)  # which transformers may give as a tensor
        if kept == 0:
            self.reset()
            return
        if self.index is not None and indexed > kept:
            # The group that is open again borrows its centre anew.
            opened = kept - kept % self.config.index_group_size
            self.operators.index_range(self.keys, self.state, opened, kept)
            indexed = kept
        self._progress = [kept, min(indexed, kept), calibrated]
        self.counters.copy_(torch.tensor((*self._progress, 0)))

    def reset(self) -> None:
        """Forget every token but keep the buffers and their addresses."""
        self.counters.zero_()
        self._progress = [0, 0, 0]
        if self.is_allocated:
            # Stale rows are masked, but a NaN among them would pass a weight of 0.
            self.keys.zero_()
            self.values.zero_()
        if self.index is not None:
            # Not the tiles alone: the next prompt must not be scored by this one's calibration.
            batch_size, num_kv_heads = self.keys.shape[:2]
            empty = self.index.allocate(batch_size, num_kv_heads, 1, self.keys.device)
            for tensor, fresh, is_tiled in zip(self.state, empty, self.index.tiled, strict=True):
                if not is_tiled:
                    tensor.copy_(fresh)

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]``, in place."""
        rows = rows.to(self.keys.device)
        self._map_batch(lambda tensor: tensor.copy_(tensor.index_select(0, rows)))

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, next to each other."""
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def select_rows(self, rows: Tensor) -> None:
        """Keep only the given rows of the batch."""
        self._map_batch(lambda tensor: tensor[rows.to(tensor.device)].contiguous())

    def _read_progress(self) -> list[int]:
        """The first three counters, from the device where the host does not know them."""
        return self.counters.tolist()[:3] if self.is_static else self._progress

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_allocated:
            return
        with torch.inference_mode(False):
            self.keys, self.values = change(self.keys), change(self.values)
            if self.index is not None:
                self.state = map_batch(self.index, self.state, change)
        self._settle()

    def _reserve(self, num_tokens: int) -> None:
        check_positions(num_tokens, self.max_positions)
        if num_tokens <= self.capacity:
            return
        # An eighth more at a time: few copies, and never twice the memory.
        self.capacity = _round_up(max(num_tokens, self.capacity + self.capacity // 8))
        with torch.inference_mode(False):
            self.keys = _grown(self.keys, self.capacity)
            self.values = _grown(self.values, self.capacity)
            if self.index is not None:
                self.state = resize(self.index, self.state, self.capacity)
        self._settle()

    def _settle(self) -> None:
        """After the buffers changed: fix their addresses and record their sizes."""
        self.operators.settle(self.keys)
        if self.is_static and not torch.compiler.is_compiling():
            buffers = (self.keys, self.values, self.counters, *self.state)
            for tensor in (*buffers, *self.operators.buffers):
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.facts.record(self)


def _is_recorded(like: Tensor) -> bool:
    """Whether this step is compiled or captured, to be replayed without the host."""
    if torch.compiler.is_compiling():
        return True
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // BUCKET_SIZE) * BUCKET_SIZE


def _grown(tensor: Tensor, capacity: int) -> Tensor:
    larger = tensor.new_zeros((*tensor.shape[:2], capacity, tensor.shape[3]))
    larger[:, :, : tensor.shape[2]] = tensor
    return larger
