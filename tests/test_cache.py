"""A layer's cache holds the rows it was given, indexed, whatever happened to it in between."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fierpatch import reference
from fierpatch.cache import BUCKET_SIZE, MARK, LayerCache
from fierpatch.config import FierConfig
from fierpatch.errors import CacheMismatchError, CapacityError, FierError, PositionLimitError
from states import assert_equal_states, assert_same, build, held
from strategies import seeds

HEAD_DIM, VALUE_DIM, NUM_KV_HEADS, NUM_GROUPS = 8, 5, 2, 3
STATIC_CAPACITY = 1024
LONGEST_QUERY = 4  # of those that go through retrieval
MAX_BATCH = 4


@st.composite
def layer_configs(draw: st.DrawFn) -> FierConfig:
    name, bits = draw(st.sampled_from((("rotated", 1), ("rotated", 2), ("fier", 1))))
    codes = (2, 3, 4, "exact") if (name, bits) == ("rotated", 1) else ("exact",)
    refine, refine_bits = draw(st.sampled_from((0, 0, 3))), draw(st.sampled_from(codes))
    budget = draw(st.sampled_from((8, 64, 600)))
    # The keys that candidates would be scored by are on the host.
    is_offloaded = draw(st.booleans()) and not (refine and refine_bits == "exact")
    return FierConfig(
        budget=budget,
        sinks=2,
        recent=3,
        index=name,
        bits=bits,
        group_size=draw(st.sampled_from((32, 128, 512))),
        refine=refine,
        refine_bits=refine_bits,
        offload=is_offloaded,
        hot_tokens=draw(st.sampled_from((None, budget, 3 * budget + 1))),
        per_query_head=draw(st.booleans()),
        max_query_length=LONGEST_QUERY,
    )


class CacheMachine(RuleBasedStateMachine):
    """A cache beside a model of it: the plain tensors of all stored keys and values."""

    @initialize(
        config=layer_configs(),
        is_static=st.booleans(),
        is_dense=st.booleans(),
        batch_size=st.integers(1, 2),
        seed=seeds(),
    )
    def start(
        self, config: FierConfig, is_static: bool, is_dense: bool, batch_size: int, seed: int
    ) -> None:
        self.config, self.is_static, self.is_dense = config, is_static, is_dense
        capacity = STATIC_CAPACITY if is_static else 0
        self.layer = LayerCache(config, capacity=capacity, is_static=is_static, is_dense=is_dense)
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.zeros(batch_size, NUM_KV_HEADS, 0, HEAD_DIM)
        self.values = torch.zeros(batch_size, NUM_KV_HEADS, 0, VALUE_DIM)
        self.balance = torch.ones(batch_size, NUM_KV_HEADS, HEAD_DIM)
        self.indexed = self.calibrated = self.longest = 0

    @property
    def stored(self) -> int:
        return self.keys.shape[2]

    def random(self, num_heads: int, count: int, width: int) -> Tensor:
        shape = (self.keys.shape[0], num_heads, count, width)
        return torch.randn(shape, generator=self.generator)

    def fresh_state(self, length: int) -> list[Tensor]:
        """The index of the model's first `length` keys, with the balance in force."""
        assert self.layer.index is not None
        is_rotated = self.config.index == "rotated"
        balance = self.balance if is_rotated else None
        return build(self.layer.index, self.keys, length, balance=balance)

    def update(self, count: int) -> bool:
        """Store new rows in both; False if a static cache was full and refused them."""
        key = self.random(NUM_KV_HEADS, count, HEAD_DIM)
        value = self.random(NUM_KV_HEADS, count, VALUE_DIM)
        if self.is_static and self.stored + count > STATIC_CAPACITY:
            with pytest.raises(CapacityError):
                self.layer.update(key, value)
            return False
        keys, values = self.layer.update(key, value)
        self.keys = torch.cat((self.keys, key), dim=2)
        self.values = torch.cat((self.values, value), dim=2)
        self.longest = max(self.longest, self.stored)
        assert torch.equal(keys[:, :, : self.stored], self.keys)
        assert torch.equal(values[:, :, : self.stored], self.values)
        is_step = count <= LONGEST_QUERY
        assert keys.shape[2] == (STATIC_CAPACITY if self.is_static and is_step else self.stored)
        for tensor in (keys, values):
            assert getattr(tensor, MARK)() is self.layer
        return True

    @rule(
        count=st.integers(LONGEST_QUERY + 1, 200),
        is_indexed=st.booleans(),
        is_given=st.booleans(),
    )
    def prompt(self, count: int, is_indexed: bool, is_given: bool) -> None:
        """A prompt or a part of one; who attends to it indexes it, who drops it does not."""
        if not self.update(count) or self.is_dense or not is_indexed:
            return
        query = self.random(NUM_KV_HEADS * NUM_GROUPS, count, HEAD_DIM)
        self.layer.index_prompt(query, self.keys if is_given else None)
        if self.stored >= 2 * self.calibrated:
            assert self.layer.index is not None
            state = self.fresh_state(0)
            folded = query.reshape(self.keys.shape[0], NUM_KV_HEADS, -1, HEAD_DIM)
            if self.layer.index.calibrate(state, folded, self.keys, self.stored):
                self.calibrated, self.balance = self.stored, state[3]
        self.indexed = self.stored

    @rule(count=st.integers(1, LONGEST_QUERY))
    def decode(self, count: int) -> None:
        """A few tokens, which retrieve from all that are stored."""
        if not self.update(count) or self.is_dense:
            return
        self.indexed = self.stored
        query = self.random(NUM_KV_HEADS * NUM_GROUPS, count, HEAD_DIM)
        output = self.layer.attend(query, visible=None, scale=0.3)
        assert self.layer.index is not None
        lists = reference.select_from_index(
            self.layer.index,
            self.fresh_state(self.stored),
            query,
            self.stored,
            budget=self.config.budget,
            sinks=self.config.sinks,
            recent=self.config.recent,
            per_query_head=self.config.per_query_head,
            scale=0.3,
            refine=self.config.refine,
            keys=None if self.config.code_bits else self.keys,
        )
        unused = min(self.config.budget, self.layer.capacity) - lists.shape[3]
        lists = torch.nn.functional.pad(lists, (0, unused), value=-1)
        expected = reference.gather_attention(query, self.keys, self.values, lists, scale=0.3)
        assert torch.equal(output, expected.transpose(1, 2))

    @rule(count=st.integers(0, 300))
    def crop(self, count: int) -> None:
        self.layer.crop(count)
        self.keep(max(self.stored - count, 0))

    @rule(count=st.integers(0, 3))
    def crop_a_little(self, count: int) -> None:
        """What assisted decoding does to the tokens it rejects."""
        self.crop(count)

    @rule()
    def reset(self) -> None:
        self.layer.reset()
        self.keep(0)

    def keep(self, length: int) -> None:
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.indexed = min(self.indexed, length)
        if length == 0:
            self.calibrated = 0
            self.balance = torch.ones_like(self.balance)

    @precondition(lambda self: self.layer.is_allocated)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Beam search: every row becomes a copy of some row, in place."""
        rows = data.draw(self.some_rows(self.keys.shape[0]))
        before = [tensor.data_ptr() for tensor in (self.layer.keys, *self.layer.state)]
        self.layer.take(rows)
        after = [tensor.data_ptr() for tensor in (self.layer.keys, *self.layer.state)]
        assert before == after
        self.map_rows(rows)

    @precondition(lambda self: self.layer.is_allocated)
    @rule(data=st.data(), size=st.integers(1, MAX_BATCH))
    def select_rows(self, data: st.DataObject, size: int) -> None:
        rows = data.draw(self.some_rows(size))
        self.layer.take(rows)
        self.map_rows(rows)

    @precondition(lambda self: self.layer.is_allocated and 2 * self.layer.batch_size <= MAX_BATCH)
    @rule()
    def repeat_rows(self) -> None:
        self.layer.take(torch.arange(self.keys.shape[0]).repeat_interleave(2))
        self.map_rows(torch.arange(self.keys.shape[0]).repeat_interleave(2))

    def some_rows(self, size: int) -> st.SearchStrategy[Tensor]:
        row = st.integers(0, self.keys.shape[0] - 1)
        return st.lists(row, min_size=size, max_size=size).map(torch.tensor)

    def map_rows(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.balance = self.balance[rows]

    @invariant()
    def counts_what_it_stored_and_indexed(self) -> None:
        assert self.layer.num_tokens == self.stored
        assert self.layer.counters.tolist() == [self.stored, self.indexed, self.calibrated, 0]
        assert self.layer.facts.counters is self.layer.counters

    @precondition(lambda self: self.layer.is_allocated)
    @invariant()
    def holds_the_rows_it_was_given(self) -> None:
        assert self.layer.batch_size == self.keys.shape[0]
        assert torch.equal(self.layer.keys[:, :, : self.stored], self.keys)
        assert torch.equal(self.layer.values[:, :, : self.stored], self.values)

    @precondition(lambda self: self.layer.is_allocated)
    @invariant()
    def holds_the_index_of_those_rows(self) -> None:
        index, state = self.layer.index, self.layer.state
        if self.is_dense:
            assert index is None
            assert state == []
            return
        assert index is not None
        fresh = held(index, self.fresh_state(self.indexed), self.indexed)
        assert_same(held(index, state, self.indexed), fresh)

    @precondition(lambda self: self.layer.is_allocated)
    @invariant()
    def allocates_in_buckets_and_not_much_more_than_needed(self) -> None:
        capacity = self.layer.capacity
        assert self.layer.keys.shape[2] == self.layer.values.shape[2] == capacity
        if self.is_static:
            assert capacity == STATIC_CAPACITY
        else:
            assert capacity % BUCKET_SIZE == 0
            assert self.longest <= capacity <= self.longest * 9 / 8 + BUCKET_SIZE
        for planes in self.layer.state[:1]:
            assert planes.shape[2] * BUCKET_SIZE == capacity

    @precondition(lambda self: self.layer.is_allocated)
    @invariant()
    def reports_the_bytes_it_holds(self) -> None:
        facts, layer = self.layer.facts, self.layer
        shape = (facts.batch_size, facts.num_kv_heads, facts.head_dim, facts.value_head_dim)
        assert shape == (self.keys.shape[0], NUM_KV_HEADS, HEAD_DIM, VALUE_DIM)
        assert facts.kv_nbytes == layer.keys.nbytes + layer.values.nbytes
        shared = 0 if layer.index is None else layer.index.num_constants
        own = layer.state[: len(layer.state) - shared]
        assert facts.index_nbytes == sum(tensor.nbytes for tensor in own)


class TestCacheMachine(CacheMachine.TestCase):
    """Any sequence of calls leaves the cache equal to its model."""

    settings = settings(stateful_step_count=15)


def rows(
    count: int, batch_size: int = 1, head_dim: int = HEAD_DIM, **options: Any
) -> tuple[Tensor, Tensor]:
    key = torch.randn(batch_size, NUM_KV_HEADS, count, head_dim, **options)
    return key, torch.randn(batch_size, NUM_KV_HEADS, count, VALUE_DIM)


def query_of(count: int, batch_size: int = 1) -> Tensor:
    return torch.randn(batch_size, NUM_KV_HEADS * NUM_GROUPS, count, HEAD_DIM)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("is_static", [False, True])
def test_the_last_reference_frees_everything(is_static: bool) -> None:
    layer = LayerCache(FierConfig(), capacity=600, is_static=is_static)
    layer.update(*rows(200))
    layer.index_prompt(query_of(200))
    returned = layer.update(*rows(1))
    layer.attend(query_of(1), visible=None, scale=0.3)
    watched = weakref.ref(layer)
    buffers = [weakref.ref(tensor) for tensor in (layer.keys, layer.values, *layer.state)]
    del layer
    assert watched() is None, "what it returned must not keep the layer alive"
    assert getattr(returned[0], MARK)() is None
    del returned
    assert [buffer() for buffer in buffers] == [None] * len(buffers)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("change", ["grow", "select", "repeat"])
def test_buffers_are_freed_when_others_replace_them(change: str) -> None:
    layer = LayerCache(FierConfig())
    layer.update(*rows(512, batch_size=2))
    layer.index_prompt(query_of(512, batch_size=2))
    buffers = [weakref.ref(tensor) for tensor in (layer.keys, layer.values, *layer.state[:3])]
    if change == "grow":
        layer.update(*rows(1, batch_size=2))
    elif change == "select":
        layer.take(torch.tensor([1]))
    else:
        layer.take(torch.tensor([0, 0, 1, 1]))
    assert [buffer() for buffer in buffers] == [None] * len(buffers)


def test_a_new_cache_is_empty() -> None:
    layer = LayerCache(FierConfig())
    assert layer.num_tokens == 0
    assert layer.batch_size == -1
    layer.crop(5)
    layer.reset()
    layer.take(torch.tensor([0]))
    assert not layer.is_allocated


def test_the_first_prompt_comes_back_as_it_went_in() -> None:
    """Without a copy, but not as the same objects: their owner may go on to mark or use them."""
    layer = LayerCache(FierConfig())
    key, value = rows(100)
    keys, values = layer.update(key, value)
    assert keys.data_ptr() == key.data_ptr()
    assert values.data_ptr() == value.data_ptr()
    assert keys is not key
    assert not hasattr(key, MARK)


def test_a_static_cache_keeps_its_addresses() -> None:
    layer = LayerCache(FierConfig(), capacity=1000, is_static=True)
    layer.update(*rows(700))
    layer.index_prompt(query_of(700))
    everything = (layer.keys, layer.values, layer.counters, *layer.state)
    addresses = [tensor.data_ptr() for tensor in everything]
    for _ in range(3):
        layer.update(*rows(1))
    layer.crop(2)
    layer.reset()
    layer.update(*rows(30))
    everything = (layer.keys, layer.values, layer.counters, *layer.state)
    assert [tensor.data_ptr() for tensor in everything] == addresses


@given(first=st.integers(1, 300), kept=st.integers(0, 300))
def test_cropped_rows_never_reach_the_output(first: int, kept: int) -> None:
    """Not even NaN: whoever attends later reads what is stored and no further."""
    assume(kept < first)
    layer = LayerCache(FierConfig(budget=64), capacity=600, is_static=True)
    key, value = rows(first)
    key[:, :, kept:], value[:, :, kept:] = torch.nan, torch.nan
    layer.update(key, value)
    layer.index_prompt(query_of(first))
    layer.crop(first - kept)
    layer.update(*rows(1))
    assert layer.attend(query_of(1), visible=None, scale=0.3).isfinite().all()


def test_a_reset_cache_holds_no_old_row() -> None:
    layer = LayerCache(FierConfig(), capacity=600, is_static=True)
    key, value = rows(200)
    layer.update(key.fill_(torch.nan), value.fill_(torch.nan))
    layer.reset()
    assert (layer.keys == 0).all()
    assert (layer.values == 0).all()


@pytest.mark.parametrize("forget", ["reset", "crop"])
@pytest.mark.parametrize("is_static", [False, True])
def test_an_emptied_cache_answers_as_a_new_one(is_static: bool, forget: str) -> None:
    """Also to a prompt too short to calibrate by, which must not inherit the last one's balance."""
    used, new = (LayerCache(FierConfig(), capacity=600, is_static=is_static) for _ in range(2))
    key, value = rows(300)
    used.update(key * torch.linspace(0.1, 10, HEAD_DIM), value)
    used.index_prompt(query_of(300))
    if forget == "reset":
        used.reset()
    else:
        used.crop(300)
    key, value, query = *rows(100), query_of(100)
    for layer in (used, new):
        layer.update(key, value)
        layer.index_prompt(query)
    assert used.index is not None
    assert_same(held(used.index, used.state, 100), held(used.index, new.state, 100))


@pytest.mark.parametrize("is_static", [False, True])
def test_a_cache_born_in_inference_mode_can_be_used_outside(is_static: bool) -> None:
    with torch.inference_mode():
        layer = LayerCache(FierConfig(), capacity=512, is_static=is_static)
        layer.update(*rows(100))
        layer.index_prompt(query_of(100))
    with torch.no_grad():
        layer.update(*rows(1))
        layer.crop(1)
        layer.take(torch.tensor([0]))
    assert layer.num_tokens == 100


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"head_dim": 16}], ids=["batch size", "head_dim"]
)
def test_what_the_cache_was_not_built_for_is_refused(change: dict[str, int]) -> None:
    layer = LayerCache(FierConfig())
    layer.update(*rows(10, batch_size=2))
    with pytest.raises(CacheMismatchError, match=r"\[2, 2, 8\]"):
        layer.update(*rows(1, **({"batch_size": 2} | change)))
    assert layer.num_tokens == 10


def test_values_of_another_width_are_refused() -> None:
    layer = LayerCache(FierConfig())
    layer.update(*rows(10))
    key, _ = rows(1)
    with pytest.raises(CacheMismatchError, match="values"):
        layer.update(key, key)


def test_keys_that_require_a_gradient_are_refused() -> None:
    layer = LayerCache(FierConfig())
    key, value = rows(10, requires_grad=True)
    with pytest.raises(FierError, match="no backward"):
        layer.update(key, value)
    with torch.no_grad():
        layer.update(key, value)


def test_more_tokens_than_positions_are_refused() -> None:
    layer = LayerCache(FierConfig(), max_positions=20)
    with pytest.raises(PositionLimitError, match=r"21 tokens .* 20 positions"):
        layer.update(*rows(21))
    layer.update(*rows(20))
    with pytest.raises(PositionLimitError, match="21 tokens"):
        layer.update(*rows(1))
    assert layer.num_tokens == 20


@pytest.mark.parametrize(
    ("positions", "value_dim"),
    [(1 << 14, 8), (20_164, VALUE_DIM)],  # whose rows fill what is reserved, to the last bucket
    ids=["whole buckets", "a part of one"],
)
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_a_growing_cache_reaches_the_last_position(
    is_offloaded: bool, positions: int, value_dim: int
) -> None:
    """By steps and by prompts, with room for no bucket behind it."""
    layer = LayerCache(FierConfig(budget=64, offload=is_offloaded), max_positions=positions)
    key = torch.randn(1, NUM_KV_HEADS, positions, HEAD_DIM)
    value = torch.randn(1, NUM_KV_HEADS, positions, value_dim)
    cuts = (0, positions - 700, positions - 100, positions - 1, positions)
    for start, stop in pairwise(cuts):
        layer.update(key[:, :, start:stop], value[:, :, start:stop])
    assert layer.capacity == -(-positions // BUCKET_SIZE) * BUCKET_SIZE
    assert torch.equal(layer.keys[:, :, :positions], key)
    assert torch.equal(layer.values[:, :, :positions], value)


def test_an_observer_sees_what_was_selected() -> None:
    layer = LayerCache(FierConfig(budget=20))
    seen: list[tuple[Any, ...]] = []

    layer.observer = lambda *arguments: seen.append(arguments)
    layer.update(*rows(100))
    layer.index_prompt(query_of(100))
    assert seen == []
    layer.update(*rows(1))
    query = query_of(1)
    layer.attend(query, visible=None, scale=0.3)
    ((who, asked, lists, visible, scale, softcap),) = seen
    assert who is layer
    assert asked is query
    assert lists.shape == (1, NUM_KV_HEADS, 1, 20)
    assert (visible, scale, softcap) == (None, 0.3, 0.0)


def test_two_layers_share_nothing() -> None:
    one, other = LayerCache(FierConfig()), LayerCache(FierConfig())
    for layer in (one, other):
        layer.update(*rows(100))
    before = [tensor.clone() for tensor in (other.keys, other.values, *other.state)]
    one.index_prompt(query_of(100))
    one.update(*rows(1))
    one.reset()
    assert_equal_states([other.keys, other.values, *other.state], before)
    assert other.num_tokens == 100


def test_a_crop_by_a_tensor_counts_in_numbers() -> None:
    """Assisted decoding counts rejected tokens on the device."""
    layer = LayerCache(FierConfig(budget=40), is_dense=True)
    key = torch.ones(1, 1, 20, 8)
    layer.update(key, key)
    layer.crop(torch.tensor(5))  # type: ignore[arg-type]
    keys, _ = layer.update(key[:, :, :2], key[:, :, :2])
    assert keys.shape[2] == layer.num_tokens == 17
