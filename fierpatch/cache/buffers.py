"""The tensors of one layer's cache, and how they come, grow, change and go."""

from __future__ import annotations

import torch
from torch import Tensor

from fierpatch.cache.checks import check_positions
from fierpatch.cache.facts import LayerFacts
from fierpatch.cache.shared import Shared
from fierpatch.config import FierConfig
from fierpatch.hot_set import HotSet
from fierpatch.index import KeyIndex, map_batch, nbytes, resize
from fierpatch.offload import DeviceStore, HostStore, Store
from fierpatch.ops.arguments import layer_index
from fierpatch.ops.operators import Operators
from fierpatch.ops.progress import check_capacity
from fierpatch.ops.reference_operators import ReferenceOperators

BUCKET_SIZE = 512  # tokens; a tile of the index


class LayerBuffers:
    """K, V, key index and hot set of one layer; see `fierpatch.cache.LayerCache`."""

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
        self._place = self._shared.enlist() if self.is_offloaded else 0
        self.index: KeyIndex | None = None
        self.state: list[Tensor] = []
        self.store: Store | None = None  # until the first update
        self.hot: HotSet | None = None  # until the first step of an offloaded layer
        # Tensors born in inference mode could not be updated outside it, in a later turn.
        with torch.inference_mode(False):
            self.counters = torch.zeros(4, dtype=torch.int64)
        # The first three counters as the host knows them: a replayed graph passes it by.
        self._progress = [0, 0, 0]
        self.operators: Operators = ReferenceOperators(config)
        self.facts = LayerFacts(self.counters)

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

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Allocate for tensors shaped, typed and placed like these, whatever their length.

        Raises:
            BackendError: the backend asked for cannot run on them.
            HostMemoryError: the offloaded layers do not fit the host.
        """
        batch_size, num_kv_heads, num_new, head_dim = key.shape
        if not self.is_static:
            check_positions(num_new, self.max_positions)
            self.capacity = max(self.capacity, _round_up(num_new))
        with torch.inference_mode(False):
            self.operators = self._shared.operators(self.config, key, value)
            self.store = self._new_store(key, value)
            if not self.is_dense:
                self.index = layer_index(self.config, head_dim)
                state = self.index.allocate(batch_size, num_kv_heads, self.capacity, key.device)
                own = len(state) - self.index.num_constants
                same = (self.index, key.device)
                self.state = state[:own] + self._shared.constants.setdefault(same, state[own:])
            if self.is_static or self.operators.name != "reference":
                self.counters = self.counters.to(key.device, copy=True)
        if self.is_offloaded and not self.config.per_query_head:
            self._make_hot(num_kv_heads)
        self._settle()

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
        self._allocated.forget(kept)
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

    def release(self) -> None:
        """Give the memory back, even if a graph or the compiler holds the tensors still."""
        self._join()
        for tensor in self.buffers:
            if tensor is self.facts.tally:
                continue  # which reports go on to read, as they do the counters
            # Not by resizing its storage: that would pull the memory from under any view of it.
            with torch.inference_mode(tensor.is_inference()):
                tensor.set_()  # type: ignore[call-overload]
        self.store = None

    def _join(self) -> None:
        """Wait for what works on the buffers beside the steps."""

    @property
    def _allocated(self) -> Store:
        assert self.store is not None, "nothing was stored yet"
        return self.store

    def _read_progress(self) -> list[int]:
        """The first three counters, from the device where the host does not know them."""
        return self.counters.tolist()[:3] if self.is_static else self._progress

    def _reserve(self, num_tokens: int, num_new: int) -> None:
        """Make room for so many tokens, the new ones among them."""
        if self.is_static:
            check_capacity(num_tokens - num_new, num_new, self.capacity)
            return
        check_positions(num_tokens, self.max_positions)
        if num_tokens <= self.capacity:
            return
        # An eighth more at a time: few copies, and never twice the memory.
        capacity = _round_up(max(num_tokens, self.capacity + self.capacity // 8))
        if self.max_positions is not None:
            capacity = min(capacity, _round_up(self.max_positions))
        self._join()  # what a fetch goes on to write would be moved under it
        store = self._allocated
        if self._place == 1:
            self._shared.check_host(store.host_nbytes * (capacity - self.capacity) // self.capacity)
        with torch.inference_mode(False):
            store.grow(capacity)
            self.capacity = capacity
            if self.index is not None:
                self.state = resize(self.index, self.state, capacity)
            if self.hot is not None:
                self.hot = self.hot.resize(capacity)
        self._settle()

    def _new_store(self, key: Tensor, value: Tensor) -> Store:
        if not self.is_offloaded:
            return DeviceStore(key, value, self.capacity)
        if self._place == 1:
            token = (key.shape[3] + value.shape[3]) * key.shape[1] * key.element_size()
            self._shared.check_host(self.capacity * key.shape[0] * token)
        most = self.capacity if self.is_static else self.max_positions
        most = None if most is None else _round_up(most)
        shared = self._shared
        store = HostStore(key, value, self.capacity, most, shared.transfer, shared.memory)
        if self.is_static:
            store.clear()  # the memory may have been another cache's
        return store

    def _make_hot(self, num_lists: int) -> None:
        batch_size, _, _, head_dim = self.keys.shape
        width = head_dim + self.values.shape[3]
        with torch.inference_mode(False):
            self.hot = HotSet.empty(
                self.config.hot_rows, self.capacity, batch_size, num_lists, width, self.keys
            )
        self._settle()

    def _settle(self) -> None:
        """After the buffers changed: fix their addresses and record their sizes."""
        self.operators.settle(self.keys)
        if self.is_static and not torch.compiler.is_compiling():
            for tensor in (*self.buffers, self.counters, *self.operators.buffers):
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.facts.record(
            self._allocated,
            self.hot,
            counters=self.counters,
            backend=self.operators.name,
            index_nbytes=0 if self.index is None else nbytes(self.index, self.state),
        )


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // BUCKET_SIZE) * BUCKET_SIZE
