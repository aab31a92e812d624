"""On a GPU a sparse prefill is what the reference says, and compiles for any length once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fierpatch
from fierpatch import FierConfig
from fierpatch.flex import Operands, PrefillSettings, Span, sparse_attention
from fierpatch.flex.prefill import chosen_spans
from fierpatch.flex.span_attention import attend_flex, attend_reference
from kernels.block_masses import check_block_masses

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
SOME = PrefillSettings(0.7, 128, 4, 16)


@pytest.mark.parametrize(
    "case",
    [
        {"num_queries": 4096, "stored": 0, "heads": (2, 4), "head_dim": 128},
        {"num_queries": 500, "stored": 9000, "heads": (2, 3), "softcap": 20.0},
        {"num_queries": 2000, "stored": 3, "pads": (0, 1990), "head_dim": 256},
        {"num_queries": 300, "stored": 900, "has_rows": True, "head_dim": 80},
        {"num_queries": 1000, "stored": 60, "head_dim": 128, "dtype": torch.float32},
    ],
    ids=str,
)
def test_masses_of_blocks_are_those_of_the_reference(case: dict[str, Any]) -> None:
    check_block_masses(**{"dtype": BF16, "device": "cuda", **case})


def make(num_queries: int, stored: int, *, has_padding: bool = False) -> Operands:
    generator = torch.Generator("cuda").manual_seed(num_queries)
    lead, length = 2 if has_padding else 1, stored + num_queries

    def draw(heads: int, tokens: int) -> torch.Tensor:
        shape = lead, heads, tokens, 64
        return torch.randn(shape, generator=generator, device="cuda", dtype=BF16)

    visible = None
    if has_padding:
        first = torch.tensor([0, length // 3], device="cuda")
        visible = (torch.arange(length, device="cuda") >= first[:, None])[:, None, None]
    return Operands(draw(6, num_queries), draw(2, length), draw(2, length), 0.25, visible=visible)


def check(operands: Operands) -> None:
    """The kernel against float64, allowed twice the error of the reference in bfloat16."""
    exact = replace(
        operands,
        query=operands.query.double(),
        keys=operands.keys.double(),
        values=operands.values.double(),
    )
    for span, chosen in chosen_spans(operands, operands.keys, SOME, backend="triton"):
        assert not chosen.all()
        expected = attend_reference(exact, span, chosen)
        found, eager = (
            attend(operands, span, chosen) for attend in (attend_flex, attend_reference)
        )
        errors = [(x.double() - expected).abs().max() for x in (found, eager)]
        largest = torch.finfo(BF16).eps * expected.abs().max()
        assert errors[0] <= 2 * (errors[1] + largest)


def test_any_length_takes_two_kernels_and_less_than_a_block_one_more() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    for num_queries, stored in ((1000, 0), (1500, 300), (640, 2000), (2048, 2048), (129, 70)):
        check(make(num_queries, stored))
    assert graphs["unique_graphs"] == 2
    for num_queries, stored in ((100, 4000), (9, 3000)):
        check(make(num_queries, stored))
    assert graphs["unique_graphs"] == 3


def test_caps_padding_and_attention_sinks_are_those_of_the_reference() -> None:
    check(make(900, 100, has_padding=True))
    check(replace(make(900, 100), softcap=5.0))
    check(replace(make(900, 100), sink_logits=torch.linspace(-2, 4, 6, device="cuda")))


def test_kernels_and_reference_choose_nearly_the_same_blocks() -> None:
    operands = make(3000, 500)
    choices = []
    for backend in ("reference", "triton"):
        spans = chosen_spans(operands, operands.keys, SOME, backend=backend)
        choices.append(torch.cat([chosen for _, chosen in spans], 2))
    # Where two blocks weigh the same but for rounding, either may be taken.
    assert (choices[0] != choices[1]).float().mean() < 1e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_span_waits_for_the_device() -> None:
    operands = make(3000, 0)
    sparse_attention(operands, operands.keys, SOME, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_attention(operands, operands.keys, SOME, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_prefills_as_densely_where_everything_is_chosen(offload: bool) -> None:
    from hf.models import prompt, tiny_model

    model = tiny_model("llama").cuda()
    ids = prompt(700).cuda()
    with torch.inference_mode():
        dense = model(ids).logits
        seen: list[Span] = []
        settings = FierConfig(prefill="sparse", prefill_mass=1.0, offload=offload)
        with fierpatch.apply(model, settings) as handle:
            cache = handle.new_cache()
            cache.stores[3].block_observer = lambda span, chosen: seen.append(span)
            sparse = model(ids, past_key_values=cache).logits
    assert seen
    torch.testing.assert_close(sparse, dense, atol=1e-3, rtol=1e-3)
