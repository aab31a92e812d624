"""Memory of the host is pinned in pieces, and no copy by the driver spans two of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fierpatch import FierConfig
from fierpatch.cache import LayerCache
from fierpatch.offload import MemoryPool, Transfer, memory
from fierpatch.offload.memory import HostMemory
from fierpatch.ops import library
from offload.store_machine import HEAD_DIM, NUM_HEADS, VALUE_DIM, StoreMachine, host_store

CPU = torch.device("cpu")
PAGE, MOST_AT_ONCE = 100, 300  # bytes


def shrink_pieces(patch: pytest.MonkeyPatch) -> None:
    """To a few rows, which end in another piece than they begin in."""
    patch.setattr(memory, "_PAGE", PAGE)
    patch.setattr(memory, "_MOST_AT_ONCE", MOST_AT_ONCE)


def ends_of(sizes: list[int]) -> list[int]:
    """Where the pieces of memory end that was grown to these sizes, one after the other."""
    ends = [0]
    for size in sizes:
        wanted = -(-size // PAGE) * PAGE
        while ends[-1] < wanted:
            ends.append(min(ends[-1] + MOST_AT_ONCE, wanted))
    return ends


@given(
    sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=6),
    bounds=st.tuples(st.integers(0, 2000), st.integers(0, 2000)).map(sorted),
)
@example(sizes=[700, 650, 1000], bounds=[0, 1000])
@example(sizes=[100, 200], bounds=[100, 100])
def test_parts_are_the_range_and_end_with_the_pieces(sizes: list[int], bounds: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shrink_pieces(patch)
        held = HostMemory(2000, CPU)
        for size in sizes:
            held.grow(size)
    start, stop = (min(bound, held.nbytes) for bound in bounds)
    parts = list(held.parts(start, stop))
    assert [place for part in parts for place in range(*part)] == list(range(start, stop))
    assert all(first < last for first, last in parts)
    ends = ends_of(sizes)
    for first, last in parts:
        assert not any(first < end < last for end in ends)
    assert all(last == first and last in ends for (_, last), (first, _) in pairwise(parts))


class DriverCopies(TorchDispatchMode):
    """Refuses what a driver would: a copy or a fill over bytes of more pieces than one.

    Of contiguous tensors PyTorch may leave any operator to the driver that is not known to be a
    kernel, or to read nothing.
    """

    ALLOWED = (
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_copy_.default,
        torch.ops.aten.index_select.default,
        torch.ops.aten.nan_to_num.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.where.self,
    )

    def __init__(self) -> None:
        super().__init__()
        self.memories: list[HostMemory] = []

    def new_memory(self, reserved: int, device: torch.device) -> HostMemory:
        self.memories.append(HostMemory(reserved, device))
        return self.memories[-1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fierpatch":
            with self:  # which is off in here, and so would be in what the operator calls
                name = func._schema.name.removeprefix("fierpatch::")
                return getattr(library, f"_{name}")(*args, **(kwargs or {}))
        if not func.is_view and func not in self.ALLOWED:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.is_contiguous():
                    self.check(func, leaf)
        return func(*args, **(kwargs or {}))

    def check(self, func: Any, tensor: Tensor) -> None:
        for held in self.memories:
            start = tensor.data_ptr() - held.host((1,), torch.uint8).data_ptr()
            if 0 <= start < held.reserved:
                parts = list(held.parts(start, start + tensor.nbytes))
                assert len(parts) <= 1, f"{func} over {parts}"


class PieceMachine(StoreMachine):
    """Over memory in pieces of a few rows, watched by a driver."""

    def __init__(self) -> None:
        super().__init__()
        self.driver, self.patch = DriverCopies(), pytest.MonkeyPatch()
        shrink_pieces(self.patch)
        self.patch.setattr(memory, "HostMemory", self.driver.new_memory)
        self.driver.__enter__()

    def teardown(self) -> None:
        self.driver.__exit__(None, None, None)
        self.patch.undo()


class TestStoresOverPieces(PieceMachine.TestCase):
    """Any sequence of calls leaves both equal to the rows they were given, by copies of a piece."""

    settings = settings(max_examples=30, stateful_step_count=12)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> DriverCopies:
    driver = DriverCopies()
    shrink_pieces(monkeypatch)
    monkeypatch.setattr(memory, "HostMemory", driver.new_memory)
    return driver


def test_a_store_copies_piece_by_piece(driver: DriverCopies) -> None:
    key, value = torch.randn(2, NUM_HEADS, 40, HEAD_DIM), torch.randn(2, NUM_HEADS, 40, VALUE_DIM)
    store = host_store(key, value, 10, MemoryPool())
    with driver:
        for start, stop in pairwise((0, 10, 17, 31, 40)):
            store.grow(stop)
            new = key[:, :, start:stop], value[:, :, start:stop]
            if start == 31:
                store.read_ahead(start, stop - start)
            keys, values = store.read(*new, start)
            store.write(*new, start)
            assert torch.equal(keys, key[:, :, :stop])
            assert torch.equal(values, value[:, :, :stop])
        store.take(torch.tensor([1, 0]), 40)
        assert torch.equal(store.keys, key.flip(0))
        store.take(torch.tensor([0, 1, 1]), 40)
        assert torch.equal(store.values, value[[1, 0, 0]])
        keys, values = store.read_all(torch.tensor(29))
        assert torch.equal(keys[:, :, :29], key[[1, 0, 0], :, :29])
        assert not values[:, :, 29:].any()
        store.clear()
    assert not store.paired.any()
    assert len(driver.memories) == 2


@pytest.mark.parametrize("is_static", [False, True])
def test_a_layer_of_the_reference_stores_steps_of_one_kv_head(
    is_static: bool, driver: DriverCopies
) -> None:
    """Whose key or value is one stretch of memory, over the end of a piece in some tokens."""
    config = FierConfig(budget=4, sinks=1, recent=1, offload=True, backend="reference")
    steps = [torch.randn(3, 1, 1, 1, HEAD_DIM) for _ in range(60)]
    layer = LayerCache(config, capacity=80 if is_static else 10, is_static=is_static)
    prompt = torch.randn(3, 1, 1, 20, HEAD_DIM)
    with driver:
        layer.update(*prompt[:2])
        layer.index_prompt(prompt[2])
        for key, value, query in steps:
            layer.update(key, value)
            output = layer.attend(query, visible=None, scale=1.0)
            assert output is not None
            assert output.isfinite().all()
    for place, rows in enumerate((layer.keys, layer.values)):
        stored = torch.cat([prompt[place], *(step[place] for step in steps)], 2)
        assert torch.equal(rows[:, :, :80], stored)
    assert driver.memories


@pytest.mark.parametrize(
    "copy",
    [Tensor.zero_, Tensor.clone, lambda rows: rows.copy_(torch.ones_like(rows))],
    ids=["zero", "clone", "copy"],
)
def test_a_copy_over_pieces_would_be_refused(
    copy: Callable[[Tensor], Tensor], driver: DriverCopies
) -> None:
    held = driver.new_memory(1000, CPU)
    held.grow(MOST_AT_ONCE + PAGE)
    rows = held.on_device((2, 50), torch.float32)
    with driver:
        copy(rows[:, :20])  # by a kernel
        copy(rows[0])
        with pytest.raises(AssertionError, match=r"over \[\(0, 300\), \(300, 400\)\]"):
            copy(rows)


def test_what_is_not_contiguous_is_not_copied() -> None:
    """Its elements lie in another order than those of the parts."""
    rows, parts = torch.zeros(3, 4).T, [torch.zeros(5), torch.zeros(7)]
    with pytest.raises(RuntimeError, match="view"):
        Transfer().send(rows, parts)
    with pytest.raises(RuntimeError, match="view"):
        Transfer().receive(parts, rows)
