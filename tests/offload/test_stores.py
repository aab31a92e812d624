"""Stores hold the rows they were given, on the device or on the host, whatever order they take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from fierpatch.errors import HostMemoryError
from fierpatch.offload import HostStore, MemoryPool, memory
from fierpatch.rows import pair
from offload.store_machine import HEAD_DIM, NUM_HEADS, VALUE_DIM, StoreMachine, host_store


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
    monkeypatch.setattr("fierpatch.offload.host_store._CHUNK", 7 * token)
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
