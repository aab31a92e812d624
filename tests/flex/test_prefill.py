"""A prompt attends to the blocks chosen for it, exactly, by the reference and by FlexAttention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import oracles
from fierpatch.errors import BackendError
from fierpatch.flex import PrefillSettings, estimated_keys, span_attention, sparse_attention
from fierpatch.flex.blocks import KEY_BLOCK, QUERY_BLOCK, Span
from fierpatch.flex.prefill import chosen_blocks
from fierpatch.flex.span_attention import Operands, attend_flex, span_mask
from fierpatch.index import FierIndex, KeyIndex, RotatedIndex
from flex.test_blocks import CPU, Prompt, prompts, settings

EVERYTHING = PrefillSettings(1.0, 1, 4, 16)
SOME = PrefillSettings(0.6, 1, 4, 16)


def whole_span(operands: Operands) -> Span:
    num_queries = operands.query.shape[2]
    last = -(-num_queries // QUERY_BLOCK)
    return Span(num_queries, operands.keys.shape[2], 0, last, CPU)


def allowed_cells(operands: Operands, chosen: Tensor) -> Tensor:
    """Bool ``[B, Hq, T, S]`` of the cells in chosen blocks that causality and padding leave."""
    num_queries, length = operands.query.shape[2], operands.keys.shape[2]
    row, token = torch.arange(num_queries), torch.arange(length)
    cells = chosen[:, :, row // QUERY_BLOCK][..., token // KEY_BLOCK]
    cells = cells & (token <= length - num_queries + row[:, None])
    return cells if operands.visible is None else cells & operands.visible


def attended(operands: Operands, settings: PrefillSettings) -> tuple[Tensor, Tensor]:
    """The output, and the blocks of the whole prompt."""
    choices = []
    output = sparse_attention(
        operands,
        operands.keys,
        settings,
        observer=lambda span, chosen: choices.append(chosen),
    )
    return output.transpose(1, 2), torch.cat(choices, 2)


def check_output(output: Tensor, operands: Operands, chosen: Tensor) -> None:
    cells = allowed_cells(operands, chosen)
    logits = {"scale": operands.scale, "softcap": operands.softcap}
    sinks = operands.sink_logits
    query, keys, values = (
        oracles.exact(tensor) for tensor in (operands.query, operands.keys, operands.values)
    )
    expected = oracles.attention(
        query, keys, values, cells.numpy(), **logits,
        sink_logits=None if sinks is None else oracles.exact(sinks),
    )  # fmt: skip
    eager = oracles.eager_attention(
        operands.query, operands.keys, operands.values, cells, **logits, sink_logits=sinks
    )
    eager = eager.nan_to_num(0.0)  # rows that see nothing
    error = np.abs(oracles.exact(output) - expected).max()
    assert error <= oracles.rounding_allowed(eager, expected)


@given(prompts(), settings, st.booleans(), st.sampled_from((torch.float32, torch.bfloat16)))
@example(Prompt(300, 130, num_groups=3), SOME, True, torch.bfloat16)
@example(Prompt(129, 0, padding=(128, 0)), SOME, False, torch.float32)
def test_a_prompt_attends_to_the_chosen_blocks_alone(
    prompt: Prompt, settings: PrefillSettings, has_sinks: bool, dtype: torch.dtype
) -> None:
    operands = prompt.operands()
    heads = operands.query.shape[1]
    operands = replace(
        operands,
        query=operands.query.to(dtype),
        keys=operands.keys.to(dtype),
        values=operands.values.to(dtype),
        sink_logits=torch.linspace(-1, 2, heads) if has_sinks else None,
    )
    output, chosen = attended(operands, settings)
    check_output(output, operands, chosen)


@given(prompts())
def test_with_a_mass_of_1_a_prompt_attends_to_all_that_it_sees(prompt: Prompt) -> None:
    operands = prompt.operands()
    output, chosen = attended(operands, EVERYTHING)
    everything = torch.ones_like(chosen)
    assert torch.equal(allowed_cells(operands, chosen), allowed_cells(operands, everything))
    check_output(output, operands, everything)


def test_spans_and_rows_are_cut_to_a_bound_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operands = Prompt(700, 50, num_groups=2, padding=(0, 60)).operands()
    spans: list[Span] = []
    rows: list[int] = []
    masked_attention = span_attention.masked_attention

    def watched(query: Tensor, keys: Tensor, *args: Tensor, **logits: float) -> Tensor:
        rows.append(query[..., 0].numel() * keys.shape[2])
        return masked_attention(query, keys, *args, **logits)

    monkeypatch.setattr(span_attention, "masked_attention", watched)
    whole = sparse_attention(operands, operands.keys, SOME)
    rows.clear()
    # Of two rows and four heads: two blocks of queries at a time.
    bound = 2 * 2 * 4 * 8 * 750
    monkeypatch.setitem(span_attention.ELEMENTS_AT_ONCE, "reference", bound)
    parts = sparse_attention(
        operands, operands.keys, SOME, observer=lambda span, chosen: spans.append(span)
    )
    assert [(span.first, span.last) for span in spans] == [(0, 2), (2, 4), (4, 6)]
    assert max(rows) <= bound
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(8, 16), (16, 8), (512, 64)])
def test_sizes_that_no_kernel_has_are_refused(head_dim: int, value_head_dim: int) -> None:
    query, keys = torch.zeros(1, 2, 9, head_dim), torch.zeros(1, 1, 9, head_dim)
    operands = Operands(query, keys, torch.zeros(1, 1, 9, value_head_dim), 1.0)
    with pytest.raises(BackendError, match=r'16 to 256 .* prefill="dense"'):
        sparse_attention(operands, keys, SOME, backend="triton")


def test_one_block_of_queries_goes_where_the_bound_is_below_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operands = Prompt(300).operands()
    whole = sparse_attention(operands, operands.keys, SOME)
    monkeypatch.setitem(span_attention.ELEMENTS_AT_ONCE, "reference", 1)
    parts = sparse_attention(operands, operands.keys, SOME)
    torch.testing.assert_close(parts, whole)


@given(prompts(), st.booleans())
def test_the_block_mask_visits_and_allows_the_cells_of_the_choice(
    prompt: Prompt, has_rows: bool
) -> None:
    operands = prompt.operands()
    if has_rows and operands.visible is not None:
        rows = operands.visible.expand(-1, -1, prompt.num_queries, -1)
        operands = replace(operands, visible=rows)
    span = whole_span(operands)
    chosen = chosen_blocks(operands, operands.keys, span, SOME)
    expected = allowed_cells(operands, chosen)
    mask = span_mask(operands, span, chosen)
    cells = create_mask(mask.mask_mod, *chosen.shape[:2], *expected.shape[2:], device="cpu")
    assert torch.equal(cells, expected)
    lists = [(mask.kv_num_blocks, mask.kv_indices)]
    if mask.full_kv_num_blocks is not None:
        lists.append((mask.full_kv_num_blocks, mask.full_kv_indices))
    visited = torch.zeros(*chosen.shape[:3], chosen.shape[3], dtype=torch.int64)
    for number, indices in lists:
        for place in np.ndindex(*number.shape):
            visited[place].index_add_(
                0, indices[place][: number[place]].long(), torch.ones(number[place]).long()
            )
    assert torch.equal(visited, chosen.long())  # each once
    if mask.full_kv_num_blocks is not None:
        for b, h, n in np.ndindex(*mask.full_kv_num_blocks.shape):
            for j in mask.full_kv_indices[b, h, n, : mask.full_kv_num_blocks[b, h, n]]:
                rows = slice(n * QUERY_BLOCK, (n + 1) * QUERY_BLOCK)
                tokens = slice(int(j) * KEY_BLOCK, (int(j) + 1) * KEY_BLOCK)
                assert expected[b, h, rows, tokens].all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(200, 230, num_groups=3, head_dim=16, scale=0.5),
        Prompt(200, 30, num_groups=2, padding=(0, 90), softcap=2.0, head_dim=16),
    ],
    ids=["groups", "padding and a cap"],
)
def test_flex_attention_agrees(prompt: Prompt) -> None:
    """Compiled anew, as PyTorch 2.13 cannot compile it for every length at once on a CPU."""
    torch._dynamo.reset()
    operands = prompt.operands()
    span = whole_span(operands)
    chosen = chosen_blocks(operands, operands.keys, span, SOME)
    assert not chosen.all()
    check_output(attend_flex(operands, span, chosen), operands, chosen)


@pytest.mark.parametrize(
    "index",
    [RotatedIndex(16), RotatedIndex(16, bits=2), RotatedIndex(16, refine_bits=4), FierIndex(16)],
    ids=str,
)
@pytest.mark.parametrize("length", [100, 512, 9000])
def test_estimated_keys_are_those_of_the_index_whatever_is_turned_back_together(
    index: KeyIndex, length: int
) -> None:
    keys = torch.randn(1, 2, length, 16)
    state = index.allocate(1, 2, length + 700, CPU)
    index.append(state, keys, 0, length)
    expected = index.dequantize(state, length)
    torch.testing.assert_close(estimated_keys(index, state, length, torch.float32), expected)
    half = estimated_keys(index, state, length, torch.bfloat16)
    torch.testing.assert_close(half, expected.bfloat16())
