"""The operators check what they are given; the library ops trace, mutate and count as they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fierpatch import ops, reference
from fierpatch.errors import CapacityError, ConfigError, ShapeError
from fierpatch.hot_set import HotSet
from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from fierpatch.rows import pair
from states import assert_equal_states, assert_same, build, held
from strategies import Problem, cuts, gaussian, indexes, lengths, problems, seeds

DIMS = (3, 8, 24, 64)
CAPACITY = 1024

Arguments = tuple[str, int, int, int, int]


def arguments_of(index: KeyIndex) -> Arguments:
    """The index as the library ops take it."""
    if isinstance(index, RotatedIndex):
        return ("rotated", index.bits, index.group_size, index.seed, index.refine_bits)
    assert isinstance(index, FierIndex)
    return ("fier", 1, index.group_size, 0, 0)


# The functional interface.


@given(index=indexes(head_dims=DIMS), length=lengths(700), room=st.integers(0, 900), seed=seeds())
def test_a_built_index_is_calibrated_and_filled(
    index: KeyIndex, length: int, room: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = gaussian((2, 2, length, index.head_dim), generator)
    query = gaussian((2, 6, 5, index.head_dim), generator)
    state = ops.build_index(index, keys, query=query, capacity=room)
    expected = index.allocate(2, 2, max(length, room), keys.device)
    # All query heads of a group calibrate their KV head.
    index.calibrate(expected, query.reshape(2, 2, 15, index.head_dim), keys, length)
    index.append(expected, keys, 0, length)
    assert_equal_states(state, expected)
    assert_equal_states(ops.build_index(index, keys), build(index, keys))


@given(data=st.data(), index=indexes(head_dims=DIMS), length=lengths(300), seed=seeds())
def test_keys_may_be_appended_later(
    data: st.DataObject, index: KeyIndex, length: int, seed: int
) -> None:
    keys = gaussian((1, 2, length, index.head_dim), torch.Generator().manual_seed(seed))
    ranges = data.draw(cuts(length))
    state = ops.build_index(index, keys[:, :, : ranges[0][1]], capacity=length)
    for start, stop in ranges[1:]:
        ops.append_keys(index, state, keys, start=start, stop=stop)
    assert_equal_states(state, build(index, keys))


@given(
    problem=problems(longest=300, head_dims=DIMS),
    data=st.data(),
    budget=st.integers(4, 310),
    per_query_head=st.booleans(),
    refine=st.sampled_from((0, 2)),
)
def test_retrieval_is_selection_then_attention(
    problem: Problem, data: st.DataObject, budget: int, per_query_head: bool, refine: int
) -> None:
    """By the operators of the same names, with scale 1 / sqrt(D); padding gives no NaN."""
    index = data.draw(indexes(head_dims=(problem.query.shape[3],), with_codes=True))
    query, keys, values = problem.query, problem.keys, problem.values
    state = ops.build_index(index, keys)
    options: dict[str, Any] = {"budget": budget, "sinks": 1, "recent": 3, "refine": refine}
    options |= {"per_query_head": per_query_head, "visible": problem.visible}
    output, lists = ops.retrieval_attention(query, keys, values, index, state, **options)
    scale = query.shape[3] ** -0.5
    expected = reference.select_from_index(
        index, state, query, keys.shape[2], scale=scale,
        keys=keys if not getattr(index, "refine_bits", 0) else None, **options,
    )  # fmt: skip
    assert torch.equal(lists, expected)
    attended = ops.gather_attention(query, keys, values, lists, scale=scale)
    assert torch.equal(output, attended)
    assert output.isfinite().all()


@given(problem=problems(longest=300, head_dims=DIMS, dtypes=(torch.float64,), kinds=(gaussian,)))
def test_retrieval_of_every_token_is_dense_attention(problem: Problem) -> None:
    query, keys, values = problem.query, problem.keys, problem.values
    length = keys.shape[2]
    index = FierIndex(query.shape[3])
    output, _ = ops.retrieval_attention(
        query,
        keys,
        values,
        index,
        ops.build_index(index, keys),
        budget=length + 20,
        visible=problem.visible,
    )
    visible = problem.visible
    if visible is None:
        visible = torch.ones(query.shape[2], length, dtype=torch.bool)
        visible = visible.tril(length - query.shape[2])
    sees = visible.expand(query.shape[0], 1, query.shape[2], length).any(-1, keepdim=True)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, keys.nan_to_num(), values.nan_to_num(), attn_mask=visible, enable_gqa=True
    )
    assert (output - torch.where(sees, dense, 0.0)).abs().max() <= 1e-12


def misfits() -> Iterator[Any]:
    """Calls that do not fit together, each with what the message names."""
    index = RotatedIndex(8)
    keys = torch.zeros(2, 2, 600, 8)
    state = ops.build_index(index, keys)
    query = torch.zeros(2, 6, 1, 8)

    def retrieve(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], object]:
        return lambda: ops.retrieval_attention(query, keys, values, index, state, budget=64)

    longer, long_query = torch.zeros(2, 2, 1025, 8), torch.zeros(2, 6, 700, 8)
    yield "keys of 3 axes", lambda: ops.build_index(index, keys[0]), r"\(2, 600, 8\)"
    yield "other head_dim", lambda: ops.build_index(RotatedIndex(16), keys), "head_dim 16"
    yield "query heads", lambda: ops.build_index(index, keys, query=query[:, :5]), r"\(2, 5, 1, 8\)"
    yield "backwards", lambda: ops.append_keys(index, state, keys, start=9, stop=8), r"9 \.\. 8"
    yield "past keys", lambda: ops.append_keys(index, state, keys, start=0, stop=601), "600 keys"
    yield "past state", lambda: ops.append_keys(index, state, longer, start=0, stop=1025), "1024"
    yield "one row", lambda: ops.append_keys(index, state, keys[:1], start=0, stop=9), "2 rows"
    yield "one head", lambda: ops.append_keys(index, state, keys[:, :1], start=0, stop=9), "2 KV"
    yield "no length", lambda: ops.index_scores(index, state, query, 0), "length=0"
    yield "long length", lambda: ops.index_scores(index, state, query, 1025), "length=1025"
    yield "scores of a row", lambda: ops.index_scores(index, state, query[:1], 600), "2 rows"
    yield "scores of 5 heads", lambda: ops.index_scores(index, state, query[:, :5], 600), "2 KV"
    yield "flat query", lambda: ops.index_scores(index, state, query[0], 600), r"\(6, 1, 8\)"
    yield "values", retrieve(query, keys, keys[:, :, :599]), "values"
    yield "query of a row", retrieve(query[:1], keys, keys), "2 rows"
    yield "unindexed keys", retrieve(query, longer, longer), "1025 keys"
    yield "more queries than keys", retrieve(long_query, keys, keys), "700 queries"
    yield "keys of a row", retrieve(query[:1], keys[:1], keys[:1]), "2 rows"


@pytest.mark.parametrize(
    ("call", "names"), [pytest.param(call, names, id=name) for name, call, names in misfits()]
)
def test_what_does_not_fit_is_refused_by_name(call: Callable[[], object], names: str) -> None:
    with pytest.raises(ShapeError, match=names):
        call()


def test_a_budget_below_its_sinks_and_recents_is_refused() -> None:
    index, keys = RotatedIndex(8), torch.zeros(1, 1, 100, 8)
    state = ops.build_index(index, keys)
    with pytest.raises(ConfigError, match="budget=19 is below"):
        ops.retrieval_attention(keys[:, :, :1], keys, keys, index, state, budget=19)


@pytest.mark.parametrize("group_size", [0, 16, 48, 1024, -32])
@pytest.mark.parametrize("make", [RotatedIndex, FierIndex])
def test_a_group_size_that_no_tile_holds_is_refused(
    make: Callable[..., KeyIndex], group_size: int
) -> None:
    with pytest.raises(ConfigError, match=f"group_size={group_size} "):
        make(64, group_size=group_size)


# The library ops, as a cache calls them.


class Layer:
    """Buffers of one layer: stored keys and values, the index beside them, and counters."""

    def __init__(self, index: KeyIndex, generator: torch.Generator, batch_size: int = 2) -> None:
        self.index = index
        self.arguments = arguments_of(index)
        self.generator = generator
        self.lead = (batch_size, 2)
        self.keys = torch.zeros(*self.lead, CAPACITY, index.head_dim)
        self.values = torch.zeros(*self.lead, CAPACITY, 5)
        self.stored = [self.keys, self.values]
        self.state = index.allocate(*self.lead, CAPACITY, self.keys.device)
        self.counters = torch.zeros(4, dtype=torch.int64)

    def rows(self, count: int, head_dim: int | None = None) -> Tensor:
        shape = (*self.lead, count, head_dim or self.index.head_dim)
        return torch.randn(shape, generator=self.generator)

    def queries(self, count: int) -> Tensor:
        return self.rows(count).repeat_interleave(3, 1)

    def append(self, count: int, *, is_prompt: bool = False) -> None:
        torch.ops.fierpatch.append(
            self.rows(count),
            self.rows(count, 5),
            self.stored,
            self.state,
            self.counters,
            is_prompt,
            *self.arguments,
        )

    def index_prompt(self, count: int) -> None:
        torch.ops.fierpatch.index_prompt(
            self.queries(count), self.keys, self.state, self.counters, *self.arguments
        )

    def prefill(self, count: int) -> None:
        self.append(count, is_prompt=True)
        self.index_prompt(count)

    def fresh(self, length: int) -> list[Tensor]:
        """The index of the stored keys, built at once by the balance in force."""
        is_balanced = isinstance(self.index, RotatedIndex)
        return build(
            self.index,
            self.keys,
            length,
            balance=self.state[3] if is_balanced else None,
            capacity=CAPACITY,
        )


def make_layer(index: KeyIndex, seed: int = 0) -> Layer:
    return Layer(index, torch.Generator().manual_seed(seed))


@given(
    index=indexes(head_dims=DIMS),
    pieces=st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=5),
    seed=seeds(),
)
@example(index=RotatedIndex(8), pieces=[(200, True), (1, False), (200, True)], seed=0)
def test_the_index_follows_what_is_stored(
    index: KeyIndex, pieces: list[tuple[int, bool]], seed: int
) -> None:
    """Whether a prompt, its pieces or single tokens, and however the balance came to be."""
    layer = make_layer(index, seed)
    stored = 0
    for count, is_prompt in pieces:
        before = int(layer.counters[1])
        layer.append(count, is_prompt=is_prompt)
        stored += count
        if is_prompt:
            assert layer.counters.tolist()[:2] == [stored, before]
            layer.index_prompt(count)
        assert layer.counters.tolist()[:2] == [stored, stored]
        assert_same(held(index, layer.state, stored), held(index, layer.fresh(stored), stored))


def test_tokens_go_where_the_last_ones_ended() -> None:
    layer = make_layer(FierIndex(8))
    key, value = layer.rows(7), layer.rows(7, 5)
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        torch.ops.fierpatch.append(
            key[:, :, start:stop],
            value[:, :, start:stop],
            layer.stored,
            layer.state,
            layer.counters,
            False,
            *layer.arguments,
        )
    assert torch.equal(layer.keys[:, :, :7], key)
    assert torch.equal(layer.values[:, :, :7], value)
    assert (layer.keys[:, :, 7:] == 0).all()
    assert layer.counters.tolist() == [7, 7, 0, 0]


def test_a_prompt_is_stored_but_not_indexed_until_asked() -> None:
    layer = make_layer(RotatedIndex(8))
    empty = [tensor.clone() for tensor in layer.state]
    layer.append(300, is_prompt=True)
    assert layer.counters.tolist() == [300, 0, 0, 0]
    assert_equal_states(layer.state, empty)
    layer.index_prompt(300)
    assert layer.counters.tolist() == [300, 300, 300, 0]


def test_short_tokens_after_an_unindexed_prompt_index_it_too() -> None:
    layer = make_layer(RotatedIndex(8))
    layer.append(300, is_prompt=True)
    layer.append(1)
    assert layer.counters.tolist() == [301, 301, 0, 0]
    assert_same(held(layer.index, layer.state, 301), held(layer.index, layer.fresh(301), 301))


def test_a_layer_without_an_index_only_stores() -> None:
    layer = make_layer(RotatedIndex(8))
    layer.state = []
    layer.append(5)
    assert layer.counters.tolist() == [5, 0, 0, 0]


def test_calibration_is_done_again_when_the_tokens_have_doubled() -> None:
    layer = make_layer(RotatedIndex(8))
    calibrated_at = []
    for count in (100, 100, 100, 100, 300):
        layer.prefill(count)
        calibrated_at.append(int(layer.counters[2]))
    # 100 tokens are too few to calibrate by; 200 do, 300 are not twice as many, 400 are, 700 not.
    assert calibrated_at == [0, 200, 200, 400, 400]


@pytest.mark.parametrize(("length", "step"), [(256, 1), (257, 2), (900, 4)])
def test_a_prompt_calibrates_by_evenly_sampled_queries(length: int, step: int) -> None:
    """By at most 256 of them, for the cost of a long prompt."""
    layer = make_layer(RotatedIndex(8))
    layer.append(length, is_prompt=True)
    query = layer.queries(length)
    torch.ops.fierpatch.index_prompt(
        query, layer.keys, layer.state, layer.counters, *layer.arguments
    )
    expected = ops.build_index(layer.index, layer.keys[:, :, :length], query=query[:, :, ::step])
    assert torch.equal(layer.state[3], expected[3])


def test_fier_is_never_calibrated() -> None:
    layer = make_layer(FierIndex(8))
    layer.prefill(600)
    assert layer.counters.tolist() == [600, 600, 0, 0]


@given(count=st.integers(1, 50))
def test_a_full_cache_refuses_and_stays_as_it_was(count: int) -> None:
    layer = make_layer(RotatedIndex(3))
    layer.append(CAPACITY - count + 1)
    before = [layer.keys.clone(), *(tensor.clone() for tensor in layer.state)]
    stored = CAPACITY - count + 1
    with pytest.raises(CapacityError, match=rf"{stored} tokens .* {count} more .* {CAPACITY}"):
        layer.append(count)
    assert_equal_states([layer.keys, *layer.state], before)
    assert layer.counters.tolist() == [stored, stored, 0, 0]


@given(
    index=indexes(head_dims=DIMS),
    length=st.integers(3, 600),
    num_queries=st.integers(1, 3),
    budget=st.sampled_from((4, 30, 600, 2000)),
    per_query_head=st.booleans(),
    is_masked=st.booleans(),
    seed=seeds(),
)
def test_retrieving_pads_the_selection_to_a_fixed_width(
    index: KeyIndex,
    length: int,
    num_queries: int,
    budget: int,
    per_query_head: bool,
    is_masked: bool,
    seed: int,
) -> None:
    """And reads no further than what is stored, though the mask spans the capacity."""
    layer = make_layer(index, seed)
    layer.append(length)
    query = layer.queries(num_queries)
    chance = torch.rand((2, 1, num_queries, CAPACITY), generator=layer.generator)
    visible = chance < 0.5 if is_masked else None
    options = (budget, 1, 2, per_query_head, 0.3, 0.0, 0, None)
    found = torch.ops.fierpatch.retrieve(
        query, layer.state, layer.counters, visible, None, *layer.arguments, *options
    )
    expected = reference.select_from_index(
        index,
        layer.state,
        query,
        length,
        budget=budget,
        sinks=1,
        recent=2,
        per_query_head=per_query_head,
        scale=0.3,
        visible=None if visible is None else visible[..., :length],
    )
    width = min(budget, CAPACITY)
    assert found.shape == (2, 6 if per_query_head else 2, num_queries, width)
    assert torch.equal(found[..., : expected.shape[3]], expected)
    assert (found[..., expected.shape[3] :] == -1).all()
    output = torch.ops.fierpatch.attend(query, layer.stored, found, None, 0.3, 0.0)
    attended = reference.gather_attention(query, layer.keys, layer.values, found, scale=0.3)
    assert output.shape == (2, num_queries, 6, 5)
    assert output.is_contiguous()
    assert torch.equal(output.transpose(1, 2), attended)


def calls() -> Iterator[Any]:
    """One call of each library op, with and without its options."""
    for index in (RotatedIndex(16, bits=2), RotatedIndex(16, refine_bits=3), FierIndex(16)):
        layer = make_layer(index)
        layer.prefill(200)
        name = arguments_of(index)[0]
        stored = (layer.stored, layer.state, layer.counters)
        append = (layer.rows(3), layer.rows(3, 5), *stored, False, *layer.arguments)
        yield f"append {name}", "append", append
        prompt = (layer.queries(200), layer.keys, layer.state, layer.counters, *layer.arguments)
        yield f"index_prompt {name}", "index_prompt", prompt
        for per_query_head in (False, True):
            visible = torch.ones(2, 1, 2, CAPACITY, dtype=torch.bool) if per_query_head else None
            sinks = torch.zeros(6) if per_query_head else None
            options = (*layer.arguments, 40, 4, 16, per_query_head, 0.25, 0.0, 0, None)
            retrieve = (layer.queries(2), layer.state, layer.counters, visible, sinks, *options)
            yield f"retrieve {name} {per_query_head}", "retrieve", retrieve
    lists = torch.arange(5).expand(2, 2, 2, 5).contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (x.to(dtype) for x in (layer.queries(2), layer.keys, layer.values))
        rest = (lists, torch.zeros(6), 0.25, 1.0)
        yield f"attend {dtype}", "attend", (query, [key, value], *rest)
        paired = pair(key, value)
        yield f"attend {dtype} paired", "attend", (query, [paired], *rest)
        hot = HotSet.empty(9, CAPACITY, 2, 2, paired.shape[3], paired).tensors
        one = (query[:, :, :1], paired, hot, lists[:, :, :1].contiguous(), *rest[1:])
        yield f"attend_hot {dtype}", "attend_hot", one


every_call = pytest.mark.parametrize(
    ("name", "arguments"), [pytest.param(*rest, id=label) for label, *rest in calls()]
)


@every_call
def test_a_library_op_keeps_to_its_schema(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.fierpatch, name).default, arguments)


@every_call
def test_a_fake_has_the_form_of_the_real_output(name: str, arguments: tuple[Any, ...]) -> None:
    op = getattr(torch.ops.fierpatch, name).default
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    if real is None:
        assert fake is None
        return
    assert fake.shape == real.shape
    assert fake.stride() == real.stride()
    assert fake.dtype == real.dtype
    assert fake.device == real.device


@pytest.mark.parametrize(
    "index", [RotatedIndex(16, bits=2), FierIndex(16)], ids=["rotated", "fier"]
)
def test_a_compiled_step_does_what_an_eager_one_does(index: KeyIndex) -> None:
    """As one graph, which is not traced again while the tokens grow."""

    def step(
        key: Tensor,
        value: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        state: list[Tensor],
        counters: Tensor,
    ) -> Tensor:
        torch.ops.fierpatch.append(
            key, value, [keys, values], state, counters, False, *arguments_of(index)
        )
        lists = torch.ops.fierpatch.retrieve(
            2 * query, state, counters, None, None, *arguments_of(index), 40, 4, 16, False,
            0.3, 0.0, 2, keys,
        )  # fmt: skip
        output = torch.ops.fierpatch.attend(2 * query, [keys, values], lists, None, 0.3, 0.0)
        return output + 1

    torch._dynamo.reset()
    eager, traced = make_layer(index), make_layer(index)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for layer in (eager, traced):
        layer.prefill(130)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            outputs = [
                run(
                    layer.rows(1),
                    layer.rows(1, 5),
                    layer.queries(1),
                    layer.keys,
                    layer.values,
                    layer.state,
                    layer.counters,
                )
                for run, layer in ((step, eager), (compiled, traced))
            ]
            assert torch.equal(*outputs)
    assert torch.equal(eager.counters, traced.counters)
    assert eager.counters.tolist()[0] == 133
    assert_equal_states([eager.keys, *eager.state], [traced.keys, *traced.state])
    torch._dynamo.reset()
