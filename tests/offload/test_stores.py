"""Stores hold the rows they were given, on the device or on the host, whatever order they take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fierpatch.errors import HostMemoryError
from fierpatch.offload import DeviceStore, HostStore, MemoryPool, Store, Transfer, memory, stores
from fierpatch.rows import pair, split
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


class TestStores(StoreMachine.TestCase):
    """Any sequence of calls leaves both equal to the rows they were given."""

    settings = settings(max_examples=30, stateful_step_count=12)


def rows(count: int, batch_size: int = 2) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(batch_size, NUM_HEADS, count, HEAD_DIM),
        torch.randn(batch_size, NUM_HEADS, count, VALUE_DIM),
    )


def filled(pool: MemoryPool, most_tokens: int | None = 100) -> tuple[HostStore, Tensor, Tensor]:
    key, value = rows(50)
    store = host_store(key, value, 60, pool, most_tokens)
    store.write(key, value, 0)
    return store, key, value


def test_a_key_and_its_value_lie_side_by_side() -> None:
    """One read for both, and one copy for a prompt."""
    key, value = rows(5)
    paired = pair(key, value)
    assert paired.shape == (5, 2, NUM_HEADS, HEAD_DIM + VALUE_DIM)
    assert paired.is_contiguous()
    assert torch.equal(paired[3, 1, 0], torch.cat((key[1, 0, 3], value[1, 0, 3])))


def test_there_is_room_for_what_was_asked_and_more_where_more_may_come() -> None:
    key, value = rows(1)
    store = host_store(key, value, 1 << 16, MemoryPool(), most_tokens=10)
    store.keys[:, :, -1:], store.values[:, :, -1:] = key, value
    with pytest.raises(HostMemoryError, match="reserved"):
        store.grow(1 << 18)
    store = host_store(key, value, 1 << 10, MemoryPool(), most_tokens=1 << 18)
    store.grow(1 << 18)
    store.keys[:, :, -1:], store.values[:, :, -1:] = key, value
    assert torch.equal(store.keys[:, :, -1:], key)


@pytest.mark.parametrize("order", [[1, 0], [0, 0], [1], [1, 0, 1, 1]], ids=str)
def test_rows_change_their_order_a_few_tokens_at_a_time(
    order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = 2 * NUM_HEADS * (HEAD_DIM + VALUE_DIM) * 4
    monkeypatch.setattr(stores, "_CHUNK", 7 * token)
    store, key, value = filled(MemoryPool())
    store.take(torch.tensor(order), 50)
    assert torch.equal(store.keys[:, :, :50], key[order])
    assert torch.equal(store.values[:, :, :50], value[order])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=str)
def test_rows_that_stay_where_they_are_are_not_read(order: list[int]) -> None:
    """They would cross to the device and back, at most steps of a beam search."""
    store, _, _ = filled(MemoryPool())
    version = store.paired._version
    store.take(torch.tensor(order), 50)
    assert (store.paired._version > version) == (order != [0, 1])


@pytest.mark.usefixtures("no_collector")
def test_memory_goes_back_to_the_pool_with_the_store() -> None:
    pool = MemoryPool()
    store, _, _ = filled(pool)
    address = store.keys.data_ptr()
    other, _, _ = filled(pool)
    assert other.keys.data_ptr() != address, "it is still in use"
    del store
    assert filled(pool)[0].keys.data_ptr() == address


@pytest.mark.usefixtures("no_collector")
def test_memory_goes_back_to_the_pool_when_other_memory_replaces_it() -> None:
    """And once only, though the store goes as well."""
    pool = MemoryPool()
    store, _, _ = filled(pool)
    first = store.keys.data_ptr()
    store.take(torch.tensor([1]), 50)
    second = store.keys.data_ptr()
    assert first != second
    assert filled(pool)[0].keys.data_ptr() == first
    del store
    held = [filled(pool)[0] for _ in range(3)]
    addresses = [one.keys.data_ptr() for one in held]
    assert {first, second} < {*addresses}
    assert len({*addresses}) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.grow(1 << 20),
        lambda store: store.take(torch.zeros(1 << 16, dtype=torch.int64), 50),
    ],
    ids=["more tokens", "more rows"],
)
def test_a_change_that_the_host_has_no_room_for_leaves_all_rows(
    change: Callable[[HostStore], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, key, value = filled(MemoryPool(), most_tokens=1 << 20)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(HostMemoryError, match="1000 are free"):
        change(store)
    assert store.keys.shape[2] == 60
    assert torch.equal(store.keys[:, :, :50], key)
    assert torch.equal(store.values[:, :, :50], value)
