"""A state machine over both stores, beside the plain tensors of all rows."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fierpatch.offload import DeviceStore, HostStore, MemoryPool, Store, Transfer
from fierpatch.rows import split
from strategies import generators

NUM_HEADS, HEAD_DIM, VALUE_DIM = 2, 4, 3
MAX_BATCH = 4


def host_store(
    key: Tensor, value: Tensor, capacity: int, pool: MemoryPool, most_tokens: int | None = None
) -> HostStore:
    return HostStore(key, value, capacity, most_tokens, Transfer(), pool)


class StoreMachine(RuleBasedStateMachine):
    """Both stores beside the plain tensors of all rows."""

    @initialize(
        batch_size=st.integers(1, 2),
        capacity=st.integers(1, 20),
        most_tokens=st.sampled_from((None, 1 << 16)),
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
        generator=generators(),
    )
    def start(
        self,
        batch_size: int,
        capacity: int,
        most_tokens: int | None,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self.dtype, self.generator, self.capacity = dtype, generator, capacity
        self.keys = torch.zeros(batch_size, NUM_HEADS, 0, HEAD_DIM, dtype=dtype)
        self.values = torch.zeros(batch_size, NUM_HEADS, 0, VALUE_DIM, dtype=dtype)
        key, value = self.random(9)  # whose shape alone counts
        self.pool = MemoryPool()
        self.host = host_store(key, value, capacity, self.pool, most_tokens)
        self.device = DeviceStore(key, value, capacity)

    @property
    def both(self) -> tuple[Store, Store]:
        return self.device, self.host

    @property
    def stored(self) -> int:
        return self.keys.shape[2]

    def random(self, count: int) -> tuple[Tensor, Tensor]:
        lead = (self.keys.shape[0], NUM_HEADS, count)
        key = torch.randn(*lead, HEAD_DIM, generator=self.generator).to(self.dtype)
        value = torch.randn(*lead, VALUE_DIM, generator=self.generator).to(self.dtype)
        return key, value

    def make_room(self, count: int) -> None:
        if self.stored + count > self.capacity:
            address = self.host.keys.data_ptr()
            self.capacity = self.stored + count + 7
            for store in self.both:
                store.grow(self.capacity)
            assert self.host.keys.data_ptr() == address

    def keep(self, key: Tensor, value: Tensor) -> None:
        self.keys = torch.cat((self.keys, key), 2)
        self.values = torch.cat((self.values, value), 2)

    @rule(count=st.integers(1, 30))
    def prompt(self, count: int) -> None:
        """Which is attended over together with all that came before."""
        self.make_room(count)
        key, value = self.random(count)
        read = [store.read(key, value, self.stored) for store in self.both]
        for store in self.both:
            store.write(key, value, self.stored)
            store.join()
        self.keep(key, value)
        for keys, values in read:
            assert torch.equal(keys, self.keys)
            assert torch.equal(values, self.values)

    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        """Written where the rows are, as operators do it."""
        self.make_room(count)
        key, value = self.random(count)
        for store in self.both:
            store.keys[:, :, self.stored : self.stored + count] = key
            keys, values = split(store.rows, HEAD_DIM)
            values[:, :, self.stored : self.stored + count] = value
            assert keys.data_ptr() == store.keys.data_ptr()
        self.keep(key, value)

    @rule(count=st.integers(1, 30))
    def read_ahead(self, count: int) -> None:
        """For a prompt that may come later, be another, or not come."""
        for store in self.both:
            store.read_ahead(self.stored, count)

    @rule(count=st.integers(0, 10))
    def crop(self, count: int) -> None:
        length = max(self.stored - count, 0)
        for store in self.both:
            store.forget(length)
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    @rule()
    def clear(self) -> None:
        for store in self.both:
            store.clear()
        assert not any(rows.any() for rows in self.device.rows)
        self.crop(self.stored)

    @rule(data=st.data(), size=st.integers(1, MAX_BATCH))
    def select_rows(self, data: st.DataObject, size: int) -> None:
        row = st.integers(0, self.keys.shape[0] - 1)
        self.take(torch.tensor(data.draw(st.lists(row, min_size=size, max_size=size))))

    @precondition(lambda self: 2 * self.keys.shape[0] <= MAX_BATCH)
    @rule()
    def repeat_rows(self) -> None:
        self.take(torch.arange(self.keys.shape[0]).repeat_interleave(2))

    @rule()
    def reverse_rows(self) -> None:
        self.take(torch.arange(self.keys.shape[0]).flip(0))

    def take(self, rows: Tensor) -> None:
        addresses = [[tensor.data_ptr() for tensor in store.rows] for store in self.both]
        for store, before in zip(self.both, addresses, strict=True):
            store.take(rows, self.stored)
            if len(rows) == self.keys.shape[0]:
                assert [tensor.data_ptr() for tensor in store.rows] == before
        self.keys, self.values = self.keys[rows], self.values[rows]

    @invariant()
    def hold_the_rows_they_were_given(self) -> None:
        lead = (self.keys.shape[0], NUM_HEADS, self.capacity)
        for store in self.both:
            assert store.keys.shape == (*lead, HEAD_DIM)
            assert store.values.shape == (*lead, VALUE_DIM)
            assert store.keys.dtype == store.values.dtype == self.dtype
            assert torch.equal(store.keys[:, :, : self.stored], self.keys)
            assert torch.equal(store.values[:, :, : self.stored], self.values)

    @invariant()
    def show_no_row_behind_the_last_one(self) -> None:
        """Or none that a weight of 0 would not hide, to those who read all there is room for."""
        assert all(rows.isfinite().all() for rows in self.device.rows)
        for store in self.both:
            keys, values = store.read_all(torch.tensor(self.stored))
            assert keys.shape[2] == values.shape[2] == self.capacity
            assert torch.equal(keys[:, :, : self.stored], self.keys)
            assert torch.equal(values[:, :, : self.stored], self.values)
        assert not keys[:, :, self.stored :].any()
        assert not values[:, :, self.stored :].any()

    @invariant()
    def say_what_they_hold_and_where(self) -> None:
        width = HEAD_DIM + VALUE_DIM
        size = self.keys.shape[0] * NUM_HEADS * self.capacity * width * self.dtype.itemsize
        assert (self.device.device_nbytes, self.device.host_nbytes) == (size, 0)
        assert (self.host.device_nbytes, self.host.host_nbytes) == (0, size)
