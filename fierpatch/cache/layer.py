"""One layer's cache: a store of K and V, the key index beside it, and how far both have come."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fierpatch.cache.checks import check_fit
from fierpatch.cache.prefetch import Prefetch
from fierpatch.cache.shared import Shared
from fierpatch.config import FierConfig
from fierpatch.errors import NotYetSupportedError
from fierpatch.hot_set import HotSet
from fierpatch.ops.backend import choose_backend

if TYPE_CHECKING:
    from fierpatch.flex import BlockObserver

MARK = "_fierpatch_layer"  # the attribute by which returned keys and values name their layer


class Observer(Protocol):
    """Sees each retrieval of each layer; see `FierCache.observe`."""

    def __call__(
        self,
        layer: LayerCache,
        query: Tensor,
        token_indices: Tensor,
        visible: Tensor | None,
        scale: float,
        softcap: float,
    ) -> None:
        """Called after each retrieval, with the arguments of `LayerCache.attend`."""


class LayerCache(Prefetch):
    """K, V and key index of one full-attention layer.

    Growing caches allocate in buckets of 512 tokens and know their length on the host. Static ones
    have a fixed capacity, fixed addresses and counters on the device, and hand out their whole
    buffers, so that a decode step compiles into one graph. With ``config.offload`` the K and V of a
    layer that is not dense are on the host, with a hot set on the device.

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
        super().__init__(
            config,
            capacity=capacity,
            is_static=is_static,
            is_dense=is_dense,
            max_positions=max_positions,
            shared=shared,
        )
        # For prompts that are compiled too: then masks are made for the whole capacity.
        self.hands_out_all = False
        self.observer: Observer | None = None
        self.block_observer: BlockObserver | None = None
        # What travels on the returned tensors and elsewhere; a strong reference would be a cycle.
        self.mark = weakref.ref(self)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return the keys and values to attend over.

        Args:
            key: ``[B, H, T, D]``, after RoPE.
            value: ``[B, H, T, Dv]``.

        Returns:
            The new tensors themselves at the first prompt, and all that are stored at a later one;
            at a step all that are stored (growing) or the whole buffers (static). Marked with this
            layer.

        Raises:
            CacheMismatchError: another batch size, head count, head_dim, dtype or device than
                before.
            CapacityError: a static cache is full.
            PositionLimitError: the model has no positions for that many tokens.
            HostMemoryError: the host has no room for them.
        """
        if not self.is_allocated:
            self.allocate(key, value)
        check_fit(key, value, self.keys, self.values)
        is_prompt = key.shape[2] > self.config.max_query_length
        if is_prompt:
            self._join(key)
        else:
            self._await_placed(key)
            self._have_next_place()
        if is_prompt and self._is_known(key):
            keys, values = self._store_prompt(key, value)
        else:
            keys, values = self._store_step(key, value, is_prompt)
        setattr(keys, MARK, self.mark)
        setattr(values, MARK, self.mark)
        return keys, values

    def mask_length(self, num_new: int) -> int:
        """The number of keys that `update` will return for so many new tokens."""
        is_step = num_new <= self.config.max_query_length or self.hands_out_all
        if self.is_static and (is_step or torch.compiler.is_compiling()):
            return self.capacity
        return self.num_tokens + num_new

    def index_prompt(self, query: Tensor, keys: Tensor | None = None) -> None:
        """Index the prompt just stored.

        Args:
            query: ``[B, Hq, T, D]``, its own, to calibrate by.
            keys: what `update` returned; None means that an offloaded layer reads the host.
        """
        known = self._progress if self._is_known(query) else None
        # On the device, where an offloaded layer has them for as long as its attention takes.
        keys = keys if self.is_offloaded and keys is not None else self.keys
        progress = self.operators.index_prompt(query, keys, self.state, self.counters, known)
        if progress is not None:
            self._progress = progress
        if self.is_offloaded and self.hot is None and not _is_recorded(query):
            self._make_hot(query.shape[1])

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
        rows = self._allocated.rows
        token_indices, rest = None, (sink_logits, scale, softcap)
        if self.is_dense:
            output = self.operators.attend_all(query, rows, self.counters, visible, *rest)
        else:
            hot = self._hot_for(query) if self.is_offloaded else None
            token_indices = self.operators.retrieve(
                query, rows, self.state, self.counters, visible, *rest
            )
            self._join(token_indices)
            output = self.operators.attend(query, rows, token_indices, self.counters, *rest, hot)
        self._have_next_fetch(output)
        if self.observer is not None and token_indices is not None:
            self.observer(self, query, token_indices, visible, scale, softcap)
        return output

    def attend_prompt(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        visible: Tensor | None,
        scale: float,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Sparse attention of a prompt that is indexed; see `fierpatch.flex.sparse_attention`.

        Args:
            query: ``[B, Hq, T, D]``.
            keys, values: what `update` returned.
            visible: bool ``[B, 1, T or 1, S]``, beside causality; None means every token.
            scale, softcap, sink_logits: as in `attend`.

        Returns:
            ``[B, T, Hq, Dv]``.

        Raises:
            NotYetSupportedError: the prompt is compiled, or in a graph.
        """
        if self.index is None or not self._is_known(query) or _is_recorded(query):
            raise NotYetSupportedError(
                'prefill="sparse" reads lengths on the host, and this prompt is compiled (as '
                "prefill_chunk_size of generate does over a static cache): use a cache that "
                'grows, or prefill="dense"'
            )
        # Not before it is needed: this imports PyTorch's compiler.
        from fierpatch.flex import Operands, PrefillSettings, estimated_keys, sparse_attention

        config = self.config
        is_cuda = keys.device.type == "cuda"
        backend = choose_backend(config, keys, values) if is_cuda else "reference"
        estimates = keys
        if config.prefill_scores == "index":
            estimates = estimated_keys(self.index, self.state, keys.shape[2], query.dtype)
        return sparse_attention(
            Operands(query, keys, values, scale, softcap, sink_logits, visible),
            estimates,
            PrefillSettings(config.prefill_mass, config.budget, config.sinks, config.recent),
            backend=backend,
            observer=self.block_observer,
        )

    def _is_known(self, like: Tensor) -> bool:
        """Whether the host knows of this prompt, so that it can be treated by its length."""
        return not (self.is_static and (self.hands_out_all or _is_recorded(like)))

    def _store_prompt(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The new tokens themselves where there are none before, else all that are stored."""
        self._progress = self._read_progress()
        stored, stop = self._progress[0], self._progress[0] + key.shape[2]
        self._reserve(stop, key.shape[2])
        store = self._allocated
        # Not the caller's tensors, whose owner may go on to use them elsewhere, but views.
        keys, values = store.read(key, value, stored) if stored else (key[:], value[:])
        store.write(key, value, stored)
        self._have_next_read(stored, key.shape[2])
        if self._place == self._shared.num_offloaded:
            store.join()  # of the last layer, behind which anything may come
        self.counters[0].fill_(stop)
        self._progress[0] = stop
        return keys, values

    def _store_step(self, key: Tensor, value: Tensor, is_prompt: bool) -> tuple[Tensor, Tensor]:
        """Everything that is stored (growing), or the whole buffers (static)."""
        store, num_new = self._allocated, key.shape[2]
        # A compiled step must not depend on what the host knows, nor change it.
        is_recorded = self.is_static and _is_recorded(key)
        if not is_recorded:
            self._reserve(self._progress[0] + num_new, num_new)
            store.join()
        self.operators.append(key, value, store.rows, self.state, self.counters, is_prompt)
        if not is_recorded:
            self._progress[0] += num_new
            if self.index is not None and not is_prompt:
                self._progress[1] = self._progress[0]
        if is_prompt:
            return store.read_all(self.counters[0])
        if self.is_static:
            return self.keys[:], self.values[:]
        stored = self._progress[0]
        return self.keys[:, :, :stored], self.values[:, :, :stored]

    def _hot_for(self, query: Tensor) -> HotSet | None:
        """The hot set, for one query a list; what more of them select is read from the host."""
        if self.hot is None and not _is_recorded(query):
            self._make_hot(query.shape[1])
        return self.hot if query.shape[2] == 1 else None


def _is_recorded(like: Tensor) -> bool:
    """Whether this step is compiled or captured, to be replayed without the host."""
    if torch.compiler.is_compiling():
        return True
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
