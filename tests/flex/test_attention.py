"""Attention over selected tokens is the reference's, in both modes, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from fierpatch.errors import BackendError, ConfigError, ShapeError
from fierpatch.flex import (
    BLOCK_SIZES,
    Mode,
    QueryLayout,
    SelectionMask,
    check_layer,
    selected_attention,
)
from fierpatch.flex.fused import kernel_options
from fierpatch.flex.rows import gather_rows
from fierpatch.reference import gather_attention, masked_attention
from fierpatch.select import select
from flex.attentions import CPU_EXP_ULPS, Attention, assert_near, log_sum_exp
from flex.cases import LENGTHS, Case, cases, lists_as_cells
from flex.compiled import FOLDED, check_chunk, check_masks
from strategies import TAME, Problem, problems, seeds

MODES: tuple[Mode, ...] = ("mask", "compact")
every_mode = st.sampled_from(MODES)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    length = draw(st.sampled_from(LENGTHS))
    return Attention(
        batch_size=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 3)),
        num_groups=draw(st.sampled_from((1, 2, 3, 5, 8))),
        num_queries=draw(st.integers(1, 8)),
        length=length,
        head_dim=draw(st.sampled_from((3, 16, 24, 80))),
        value_head_dim=draw(st.sampled_from((5, 16))),
        width=draw(st.integers(1, 60)),
        per_query_head=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 2.0))),
        has_sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
    )


@given(
    case=attentions(),
    mode=every_mode,
    block_size=st.sampled_from(BLOCK_SIZES),
    in_order=st.booleans(),
    seed=seeds(),
)
def test_eager_attention_is_the_reference_s(
    case: Attention, mode: Mode, block_size: int, in_order: bool, seed: int
) -> None:
    """With its log-sum-exp; the order within a list does not matter."""
    tensors, options = case.tensors(seed), case.options(seed)
    query, keys, values, lists = tensors
    output, lse = selected_attention(
        query, keys, values, lists if in_order else lists.flip(3), **options,
        mode=mode, block_size=block_size, is_ascending=in_order, with_lse=True,
    )  # fmt: skip
    assert_near(output, tensors, options)
    assert lse is not None
    exact = log_sum_exp(query, keys, lists, **options)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@given(
    problem=problems(longest=300, kinds=TAME, head_dims=(8, 24, 80)),
    mode=every_mode,
    per_query_head=st.booleans(),
    softcap=st.sampled_from((0.0, 5.0)),
)
def test_a_selection_of_every_token_is_dense_attention(
    problem: Problem, mode: Mode, per_query_head: bool, softcap: float
) -> None:
    """Padding may hold NaN where rows are gathered; a mask reads the rows beside those chosen."""
    query, keys, values, visible = problem.query, problem.keys, problem.values, problem.visible
    num_queries, length = query.shape[2], keys.shape[2]
    if visible is None:
        visible = torch.ones(1, 1, num_queries, length).tril(length - num_queries).bool()
    lists = select(
        torch.zeros(*query.shape[:3], length), num_kv_heads=keys.shape[1], budget=length,
        sinks=0, recent=1, per_query_head=per_query_head, scale=1.0, visible=visible,
    )  # fmt: skip
    given_values = values.nan_to_num() if mode == "mask" else values
    output, lse = selected_attention(
        query, keys, given_values, lists, scale=0.2, softcap=softcap, mode=mode
    )
    assert lse is None
    options: dict[str, Any] = {"scale": 0.2, "softcap": softcap}
    exact = masked_attention(query.double(), keys.double(), values.double(), visible, **options)
    reference = masked_attention(query, keys, values, visible, **options)
    error, allowed = ((x.double() - exact).abs().max() for x in (output, reference))
    assert error <= 2 * (allowed + torch.finfo(query.dtype).eps * exact.abs().max())


@given(case=attentions(), mode=every_mode, cut=st.integers(0, 60), seed=seeds())
def test_two_halves_of_a_selection_merge_by_their_log_sum_exp(
    case: Attention, mode: Mode, cut: int, seed: int
) -> None:
    """Of which the second alone has the sinks."""
    query, keys, values, lists = case.tensors(seed)
    query, keys, values = query.double(), keys.double(), values.double()
    options = case.options(seed)
    parts = []
    for half, sinks in ((lists[..., :cut], None), (lists[..., cut:], options["sink_logits"])):
        if half.shape[3] == 0:
            continue
        output, lse = selected_attention(
            query, keys, values, half, **options | {"sink_logits": sinks}, mode=mode, with_lse=True
        )
        assert lse is not None
        parts.append((output, lse))
    whole = torch.stack([lse for _, lse in parts]).logsumexp(0)
    merged = sum(output * (lse - whole).exp().nan_to_num().unsqueeze(3) for output, lse in parts)
    expected = gather_attention(query, keys, values, lists, **options)
    has_sink_alone = (lists[..., cut:] < 0).all(-1)
    if options["sink_logits"] is not None and has_sink_alone.any():
        return  # a list without tokens has no sink either
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


# Compiled, some 6 s each: what differs in kind, not in size.

COMPILED = [
    # One query a list over 512 keys and more, which torch's own choice of template gets wrong.
    pytest.param("mask", Attention(num_groups=1, length=1040, per_query_head=True), id="mask-1"),
    pytest.param(
        "mask",
        Attention(num_queries=3, head_dim=24, value_head_dim=5, length=649, softcap=4.0,
                  per_query_head=True, dtype=torch.bfloat16),
        marks=pytest.mark.slow, id="mask-3",
    ),
    pytest.param(
        "compact", Attention(num_groups=1, length=90, width=600, head_dim=3),
        marks=pytest.mark.slow, id="compact-1",
    ),
    pytest.param(
        "compact",
        Attention(num_queries=8, num_groups=7, head_dim=80, softcap=2.0, has_sinks=True,
                  dtype=torch.float16),
        id="compact-8",
    ),
]  # fmt: skip


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("mode", "case"), COMPILED)
def test_compiled_attention_is_the_reference_s_for_every_selection(
    mode: Mode, case: Attention
) -> None:
    """Without compiling again, for lists without any token too."""
    options = case.options()

    def attend(query: Tensor, keys: Tensor, values: Tensor, lists: Tensor) -> Tensor:
        output, _ = selected_attention(
            2 * query, keys, values, lists, **options, mode=mode, is_ascending=True
        )
        return output.transpose(1, 2) + 0.0

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=counter)
    for seed in range(4):
        query, keys, values, lists = case.tensors(seed, is_dark=seed == 3)
        output = compiled(query, keys, values, lists).transpose(1, 2)
        tensors = (2 * query, keys, values, lists)
        assert_near(output, tensors, options, exp_ulps=CPU_EXP_ULPS)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_what_makes_a_mask_may_be_compiled_as_it_is_on_cuda(
    mode: Mode, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the open. On a CPU inductor takes that apart from the attention alone."""
    for part in ("selection", "rows"):
        monkeypatch.setattr(f"fierpatch.flex.{part}.can_fuse", lambda like: True)
    case = Attention(num_queries=2, has_sinks=True, per_query_head=True)
    options = case.options()

    def made(query: Tensor, keys: Tensor, values: Tensor, lists: Tensor) -> Any:
        if mode == "compact":
            return gather_rows(keys, values, lists, with_sink=True, block_size=16)
        mask = SelectionMask.of(QueryLayout(6, 2, 3), lists, length=300, is_ascending=True)
        return mask.words, mask.num_blocks, mask.block_indices

    def attend(*tensors: Tensor) -> Any:
        return selected_attention(*tensors, scale=0.3, mode="compact", is_ascending=True)[0]

    step = made if compiler == "inductor" or mode == "mask" else attend
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=compiler)
    for seed in range(3):
        tensors = case.tensors(seed, is_dark=seed == 2)
        if step is attend:
            assert_near(compiled(*tensors), tensors, options | {"sink_logits": None})
        else:
            for one, other in zip(compiled(*tensors), made(*tensors), strict=True):
                assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_kernel_reads_the_words_that_were_made_in_its_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the open as on CUDA; cleared by a constant, the words would be compiled to be 0."""
    monkeypatch.setattr("fierpatch.flex.selection.can_fuse", lambda like: True)
    case = Attention(batch_size=1, num_groups=4, length=64, value_head_dim=64, width=8)
    query, keys, _, lists = case.tensors(0)
    values = torch.eye(64).expand(1, 2, 64, 64).contiguous()
    layout = QueryLayout(8, 1, 4)

    def weights(query: Tensor, keys: Tensor, values: Tensor, lists: Tensor) -> Any:
        mask = SelectionMask.of(layout, lists, length=64, is_ascending=True)
        options: Any = kernel_options(keys, values, 16)
        return flex_attention(
            query, keys, values, block_mask=mask.block_mask, kernel_options=options
        )

    compiled = torch.compile(weights, fullgraph=True, dynamic=False)
    output = compiled(query.view(1, 2, 4, -1), keys, values, lists)
    assert torch.equal(output > 0, lists_as_cells(lists, 2, 64).expand(1, 2, 4, 64))


@settings(max_examples=4)
@given(case=cases(is_folded=True, longest=129))
@example(FOLDED)
def test_compiled_masks_allow_the_cells_of_their_dense_masks(case: Case) -> None:
    """A compilation each, so few."""
    torch.compiler.reset()
    check_masks("cpu", case)
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_chunk_of_a_prefill_visits_its_blocks_alone() -> None:
    check_chunk("cpu", num_queries=40, block_size=(16, 32))


# What is refused.


def test_what_does_not_fit_is_refused_by_name() -> None:
    query, keys, values, lists = Attention().tensors(0)

    def attend(*tensors: Tensor, **options: Any) -> None:
        selected_attention(*tensors, scale=1.0, **options)

    with pytest.raises(ShapeError, match="want 4 axes"):
        attend(query[0], keys, values, lists)
    for misfit in (
        (query[:, :5], keys, values), (query[:1], keys, values), (query[..., :8], keys, values),
        (query, keys, values[:, :, 1:]),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match="do not fit each other"):
            attend(*misfit, lists)
    for wrong in (lists[:, :1], lists[:1], lists.expand(-1, -1, 2, -1)):
        with pytest.raises(ShapeError, match="2 or 6, 1, K"):
            attend(query, keys, values, wrong)
    with pytest.raises(ConfigError, match=r"block_size=24 .*16, 32, 64, 128"):
        attend(query, keys, values, lists, block_size=24)
    with pytest.raises(ConfigError, match="'mask', 'compact'"):
        attend(query, keys, values, lists, mode="dense")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", [{"with_lse": True}, {"has_sinks": True, "mode": "mask"}])
def test_a_log_sum_exp_that_a_compiled_cpu_call_has_not_is_refused(options: Any) -> None:
    case = Attention(has_sinks=options.pop("has_sinks", False))
    sinks = case.options()["sink_logits"]

    def attend(query: Tensor, keys: Tensor, values: Tensor, lists: Tensor) -> Any:
        return selected_attention(
            query, keys, values, lists, scale=0.3, sink_logits=sinks, **options
        )

    with pytest.raises(Exception, match=r"no log-sum-exp.*mode=\"compact\""):
        torch.compile(attend, backend="eager", fullgraph=True)(*case.tensors(0))


def test_a_layer_that_has_no_kernel_is_refused_with_the_way_round() -> None:
    def layer(size: int, dtype: torch.dtype, device: str) -> Tensor:
        return torch.empty(1, 1, 4, size, dtype=dtype, device=device)

    half, double = torch.bfloat16, torch.float64
    check_layer(layer(3, double, "cpu"), layer(5, double, "cpu"), is_compiled=False)
    with pytest.raises(BackendError, match=r"float64.*compiled on a CPU; use .*\"reference\""):
        check_layer(layer(8, double, "cpu"), layer(8, double, "cpu"), is_compiled=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        with pytest.raises(BackendError, match=r"AVX2.*DEFAULT"):
            check_layer(layer(8, half, "cpu"), layer(8, half, "cpu"), is_compiled=True)
    with pytest.raises(BackendError, match="one dtype"):
        check_layer(layer(8, half, "cpu"), layer(8, double, "cpu"), is_compiled=False)
    with pytest.raises(BackendError, match="this is meta"):
        check_layer(layer(8, half, "meta"), layer(8, half, "meta"), is_compiled=False)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fits, narrow, wide = (layer(size, half, "cuda") for size in (16, 15, 257))
        check_layer(fits, fits, is_compiled=True)
        for key, value in ((narrow, fits), (fits, wide)):
            with pytest.raises(BackendError, match="16 to 256"):
                check_layer(key, value, is_compiled=False)
        with pytest.raises(BackendError, match=r"float64.*on CUDA"):
            check_layer(layer(16, double, "cuda"), layer(16, double, "cuda"), is_compiled=False)


# The library ops.


def calls() -> Iterator[Any]:
    query, keys, values, lists = Attention(num_queries=2).tensors(0)
    mask = SelectionMask.of(Case(2, 2, 3, 2, 300, True, 0).layout, lists, length=300)
    in_place = (lists, mask.words, mask.num_blocks, mask.block_indices, 16, True)
    yield pytest.param("flex_select_", in_place, id="select in place")
    for is_ascending in (False, True):
        yield pytest.param("flex_select", (lists, 2, 300, 32, is_ascending), id=str(is_ascending))
    for with_sink in (False, True):
        arguments = (keys, values, lists, with_sink, 16)
        yield pytest.param("flex_gather", arguments, id=f"gather {with_sink}")
    paired = torch.zeros(300, 2, 2, 32).permute(1, 2, 0, 3)
    arguments = (paired[..., :16], paired[..., 16:], lists, False, 64)
    yield pytest.param("flex_gather", arguments, id="gather paired")
    yield pytest.param("flex_apart", (query.transpose(1, 2),), id="apart")


@pytest.mark.parametrize(("name", "arguments"), list(calls()))
def test_a_library_op_keeps_to_its_schema(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.fierpatch, name).default, arguments)


@given(case=attentions(), seed=seeds())
def test_rows_may_lie_in_any_order_in_memory(case: Attention, seed: int) -> None:
    query, keys, values, lists = case.tensors(seed)
    strided = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (keys, values)]
    outputs = [
        selected_attention(query, *rows, lists, scale=1.0, mode="compact")[0]
        for rows in ((keys, values), strided)
    ]
    assert torch.equal(*outputs)


def test_a_gradient_is_neither_asked_for_nor_given() -> None:
    query, keys, values, lists = Attention().tensors(0)
    output, _ = selected_attention(query.requires_grad_(), keys, values, lists, scale=1.0)
    assert not output.requires_grad


@given(case=attentions(), mode=every_mode, seed=seeds())
def test_cells_beyond_the_lists_have_no_weight(case: Attention, mode: Mode, seed: int) -> None:
    """Values are a unit matrix, so that the output is the weights."""
    query, keys, _, lists = case.tensors(seed)
    values = torch.eye(case.length, dtype=case.dtype).expand(*keys.shape[:2], -1, -1)
    output, _ = selected_attention(query, keys, values, lists, scale=0.01, mode=mode)
    assert torch.equal(output > 0, lists_as_cells(lists, query.shape[1], case.length))
