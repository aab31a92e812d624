"""One layer's cache: a store of K and V, the key index beside it, and how far both have come."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fierpatch.cache.checks import check_fit, check_positions
from fierpatch.cache.facts import LayerFacts, Observer
from fierpatch.cache.shared import Shared
from fierpatch.config import FierConfig
from fierpatch.hot_set import HotSet
from fierpatch.index import KeyIndex, map_batch, resize
from fierpatch.offload import DeviceStore, HostStore, Store
from fierpatch.ops.library import check_capacity
from fierpatch.ops.operators import Operators, ReferenceOperators, layer_index

BUCKET_SIZE = 512  # tokens; a tile of the index

MARK = "_fierpatch_layer"  # the attribute by which returned keys and values name their layer


class LayerCache:
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
        self.config = config
        self.is_static = is_static
        self.is_dense = is_dense
        self.max_positions = max_positions
        self._shared = shared or Shared()
        self.capacity = _round_up(max(capacity, 1))
        if is_static and max_positions is not None:
            self.capacity = min(self.capacity, max_positions)
        self.is_offloaded = config.offload and not is_dense
        self._is_last = self._shared.enlist() if self.is_offloaded else lambda: False
        # For prompts that are compiled too: then masks are made for the whole capacity.
        self.hands_out_all = False
        self.observer: Observer | None = None
        self.index: KeyIndex | None = None
        self.state: list[Tensor] = []
        self.store: Store | None = None  # until the first update
        self.hot: HotSet | None = None  # until the first step of an offloaded layer
        self.next: weakref.ref[LayerCache] | None = None  # the model's next layer, if it is ours
        self.has_previous = False  # whether it has one before it that is ours
        self._estimate: Tensor | None = None  # of the next query, to be fetched for
        self._started: tuple[Tensor, Tensor] | None = None  # by that query
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
        return self.store is not None

    @property
    def keys(self) -> Tensor:
        """``[B, H, C, D]``, wherever its memory is."""
        return self._allocated.keys

    @property
    def values(self) -> Tensor:
        """``[B, H, C, Dv]``, wherever its memory is."""
        return self._allocated.values

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors that grow with the capacity."""
        if self.store is None:
            return ()
        hot = self.hot.tensors if self.hot is not None else []
        return (*self.store.rows, *self.state, *hot)

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
        if self.store is not None:
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
        if self.store is None:
            self.allocate(key, value)
        check_fit(key, value, self.keys, self.values)
        self._join()
        is_prompt = key.shape[2] > self.config.max_query_length
        if is_prompt and not (self.is_static and (self.hands_out_all or _is_recorded(key))):
            keys, values = self._store_prompt(key, value)
        else:
            keys, values = self._store_step(key, value, is_prompt)
        setattr(keys, MARK, self._mark)
        setattr(values, MARK, self._mark)
        return keys, values

    def mask_length(self, num_new: int) -> int:
        """The number of keys that `update` will return for so many new tokens."""
        is_step = num_new <= self.config.max_query_length or self.hands_out_all
        if self.is_static and (is_step or torch.compiler.is_compiling()):
            return self.capacity
        return self.num_tokens + num_new

    def _store_prompt(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The new tokens themselves where there are none before, else all that are stored."""
        store = self._allocated
        self._progress = self._read_progress()
        stored, num_new = self._progress[0], key.shape[2]
        stop = stored + num_new
        self._reserve(stop, num_new)
        # Not the caller's tensors, whose owner may go on to use them elsewhere, but views.
        keys, values = key[:], value[:]
        if isinstance(store, HostStore):
            if stored:
                keys, values = store.read(key, value, stored)
            store.send(key, value, stored)
            if self._is_last():
                store.join()
            self.counters[0].fill_(stop)
        else:
            self.operators.append(key, value, store.rows, self.state, self.counters, True)
            if stored:
                keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        self._progress[0] = stop
        return keys, values

    def _store_step(self, key: Tensor, value: Tensor, is_prompt: bool) -> tuple[Tensor, Tensor]:
        """Everything that is stored (growing), or the whole buffers (static)."""
        store, num_new = self._allocated, key.shape[2]
        # A compiled step must not depend on what the host knows, nor change it.
        is_recorded = self.is_static and _is_recorded(key)
        if not is_recorded:
            self._reserve(self._progress[0] + num_new, num_new)
            if isinstance(store, HostStore):
                store.join()
        self.operators.append(key, value, store.rows, self.state, self.counters, is_prompt)
        if not is_recorded:
            self._progress[0] += num_new
            if self.index is not None and not is_prompt:
                self._progress[1] = self._progress[0]
        if is_prompt and isinstance(store, HostStore):
            return store.read_all(self.counters[0])
        if self.is_static:
            return self.keys[:], self.values[:]
        stored = self._progress[0]
        return self.keys[:, :, :stored], self.values[:, :, :stored]

    def index_prompt(self, query: Tensor, keys: Tensor | None = None) -> None:
        """Index the prompt just stored.

        Args:
            query: ``[B, Hq, T, D]``, its own, to calibrate by.
            keys: what `update` returned; None means that an offloaded layer reads the host.
        """
        is_known = not (self.is_static and (self.hands_out_all or _is_recorded(query)))
        known = self._progress if is_known else None
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
        following = self.next() if self.next is not None else None
        if self.is_dense:
            attended = self.operators.attend_all(
                query, rows, self.counters, visible, sink_logits, scale, softcap
            )
            if following is not None:
                following._start()
            return attended
        hot = self._hot_for(query) if self.is_offloaded else None
        output, token_indices = self.operators.attend(
            query, rows, self.state, self.counters, visible, sink_logits, scale, softcap, hot
        )
        if following is not None:
            following._start()
        if self.observer is not None:
            self.observer(self, query, token_indices, visible, scale, softcap)
        return output

    def prefetch(self, query: Tensor) -> None:
        """Fetch what the next step will probably select; no result depends on it.

        It starts when the layer before this one has attended, whose own rows come first, or at once
        if that is none of ours.

        Args:
            query: ``[B, Hq, 1, D]``, an estimate of the next step's, after RoPE.
        """
        if self.hot is None:
            return
        self._estimate = query
        if not self.has_previous:
            self._start()

    def _start(self) -> None:
        """Start to fetch by the estimate, if there is one."""
        query, self._estimate = self._estimate, None
        if query is not None and self.hot is not None:
            room = self.operators.fetch_ahead(
                query, self._allocated.rows, self.state, self.counters, self.hot
            )
            self._started = query, room

    def _join(self) -> None:
        """Wait for what was started, before anything that it reads changes."""
        self._estimate = None
        if self._started is not None:
            (query, room), self._started = self._started, None
            self.operators.join(self.counters, query, room)

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Allocate for tensors shaped, typed and placed like these, whatever their length.

        Raises:
            BackendError: the backend asked for cannot run on them.
            HostMemoryError: an offloaded layer does not fit the host.
        """
        batch_size, num_kv_heads, num_new, head_dim = key.shape
        if not self.is_static:
            check_positions(num_new, self.max_positions)
            self.capacity = max(self.capacity, _round_up(num_new))
        with torch.inference_mode(False):
            self.operators = self._shared.operators(self.config, key, value)
            if self.is_offloaded:
                most = self.capacity if self.is_static else self.max_positions
                shared = self._shared
                self.store = HostStore(
                    key, value, self.capacity, most, shared.transfer, shared.memory
                )
            else:
                self.store = DeviceStore(key, value, self.capacity)
            if not self.is_dense:
                self.index = layer_index(self.config, head_dim)
                state = self.index.allocate(batch_size, num_kv_heads, self.capacity, key.device)
                own = len(state) - self.index.num_constants
                constants = self._shared.constants
                self.state = state[:own] + constants.setdefault(
                    (self.index, key.device), state[own:]
                )
            if self.is_static or self.operators.name != "reference":
                self.counters = self.counters.to(key.device, copy=True)
        if self.is_offloaded and not self.config.per_query_head:
            self._make_hot(num_kv_heads)
        self._settle()

    def crop(self, num_removed: int) -> None:
        """Forget the newest `num_removed` tokens."""
        self._join()
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
        if self.hot is not None:
            self.hot.forget(kept)
        self._progress = [kept, min(indexed, kept), calibrated]
        self.counters.copy_(torch.tensor((*self._progress, 0)))

    def reset(self) -> None:
        """Forget every token but keep the buffers and their addresses."""
        self._join()
        self.counters.zero_()
        self._progress = [0, 0, 0]
        if self.store is not None:
            self.store.clear()
        if self.hot is not None:
            self.hot.clear()
        if self.index is not None:
            # Not the tiles alone: the next prompt must not be scored by this one's calibration.
            batch_size, num_kv_heads = self.keys.shape[:2]
            empty = self.index.allocate(batch_size, num_kv_heads, 1, self.keys.device)
            for tensor, fresh, is_tiled in zip(self.state, empty, self.index.tiled, strict=True):
                if not is_tiled:
                    tensor.copy_(fresh)

    def take(self, rows: Tensor) -> None:
        """Make row i of the batch a copy of row ``rows[i]``, in place where there are as many."""
        if self.store is None:
            return
        self._join()
        rows = rows.to(self.keys.device)
        is_same = len(rows) == self.batch_size

        def change(tensor: Tensor) -> Tensor:
            taken = tensor.index_select(0, rows)
            return tensor.copy_(taken) if is_same else taken

        with torch.inference_mode(False):
            self.store.take(rows, self.num_tokens)
            if self.index is not None:
                self.state = map_batch(self.index, self.state, change)
            if self.hot is not None:
                self.hot = self.hot.map_batch(change)
        self._settle()

    def release(self) -> None:
        """Give the memory back, even if a graph or the compiler holds the tensors still."""
        for tensor in self.buffers:
            # Not by resizing its storage: that would pull the memory from under any view of it.
            with torch.inference_mode(tensor.is_inference()):
                tensor.set_()  # type: ignore[call-overload]
        self.store = None

    def _read_progress(self) -> list[int]:
        """The first three counters, from the device where the host does not know them."""
        return self.counters.tolist()[:3] if self.is_static else self._progress

    @property
    def _allocated(self) -> Store:
        assert self.store is not None, "nothing was stored yet"
        return self.store

    def _hot_for(self, query: Tensor) -> HotSet | None:
        """The hot set, for one query a list; what more of them select is read from the host."""
        if self.hot is None and not _is_recorded(query):
            self._make_hot(query.shape[1])
        return self.hot if query.shape[2] == 1 else None

    def _make_hot(self, num_lists: int) -> None:
        batch_size, _, _, head_dim = self.keys.shape
        width = head_dim + self.values.shape[3]
        with torch.inference_mode(False):
            self.hot = HotSet.empty(
                self.config.hot_rows, self.capacity, batch_size, num_lists, width, self.keys
            )
        self._settle()

    def _reserve(self, num_tokens: int, num_new: int) -> None:
        if self.is_static:
            check_capacity(num_tokens - num_new, num_new, self.capacity)
            return
        check_positions(num_tokens, self.max_positions)
        if num_tokens <= self.capacity:
            return
        # An eighth more at a time: few copies, and never twice the memory.
        capacity = _round_up(max(num_tokens, self.capacity + self.capacity // 8))
        with torch.inference_mode(False):
            self._allocated.grow(capacity)
            self.capacity = capacity
            if self.index is not None:
                self.state = resize(self.index, self.state, capacity)
            if self.hot is not None:
                self.hot = self.hot.resize(capacity)
        self._settle()

    def _settle(self) -> None:
        """After the buffers changed: fix their addresses and record their sizes."""
        self.operators.settle(self.keys)
        if self.is_static and not torch.compiler.is_compiling():
            for tensor in (*self.buffers, self.counters, *self.operators.buffers):
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.facts.record(self)


def _is_recorded(like: Tensor) -> bool:
    """Whether this step is compiled or captured, to be replayed without the host."""
    if torch.compiler.is_compiling():
        return True
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // BUCKET_SIZE) * BUCKET_SIZE
