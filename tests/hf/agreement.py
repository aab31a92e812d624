"""Whether two models that should be one and the same generate alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

import fierpatch
from fierpatch.reference import masked_attention

FULL_BUDGET = 4096  # more than any prompt of the tests
RECORD = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}

Run = Callable[[PreTrainedModel], Any]


def assert_agrees(make: Callable[[], PreTrainedModel], run: Run, **settings: Any) -> None:
    """With budget for every token a patched model gives the tokens and logits of an unpatched one.

    Args:
        make: gives equal models.
        run: what to do with each; returns an output of ``generate`` under `RECORD`.
        **settings: fields of `FierConfig`.
    """
    stock = run(make())
    with in_float64(make()) as model:
        exact = run(model)
    model = make()
    with fierpatch.apply(model, budget=FULL_BUDGET, **settings):
        patched = run(model)
    assert torch.equal(patched.sequences, stock.sequences)
    assert torch.equal(exact.sequences, stock.sequences), "nearly equal logits: take another seed"
    dtype = make().dtype
    for name in ("logits", "scores"):
        outputs = (getattr(output, name) for output in (patched, stock, exact))
        assert_as_close(*(torch.stack(steps) for steps in outputs), dtype=dtype)


def assert_as_close(
    patched: Tensor, stock: Tensor, exact: Tensor, *, dtype: torch.dtype | None = None
) -> None:
    """The patched result is as close to the exact one as the stock result, twice over.

    Args:
        dtype: what both were computed in; None means the dtype of `stock`.
    """
    finite = exact.isfinite()  # generate masks scores with -inf
    assert torch.equal(patched.isfinite(), finite)
    patched, stock, exact = (x[finite].double() for x in (patched, stock, exact))
    rounding = torch.finfo(dtype or stock.dtype).eps * exact.abs().max()
    error, allowed = (patched - exact).abs().max(), (stock - exact).abs().max() + rounding
    assert error <= 2 * allowed, f"{error:.2e} against {allowed:.2e} of the unpatched model"


@contextmanager
def in_float64(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The same model in float64, attention included.

    Every attention function of transformers takes its softmax in float32; the eager ones also turn
    padding into NaN where masks are float64.
    """
    # The grouped product of mixture-of-experts models has no float64.
    if model.get_experts_implementation().get("") == "grouped_mm":
        model.set_experts_implementation("eager")
    # SDPA knows neither soft capping nor sinks, and leaves them out.
    is_plain = model.config._attn_implementation == "sdpa"
    name = "exact_plain" if is_plain else "exact"
    AttentionInterface.register(name, functools.partial(_exact_attention, is_plain=is_plain))
    AttentionMaskInterface.register(name, _exact_mask)
    try:
        model.set_attn_implementation(name)
        yield model.double()
    finally:
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


def _exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    is_plain: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    output = masked_attention(
        query,
        key,
        value,
        attention_mask,
        scale=scaling,
        softcap=0.0 if is_plain else softcap or 0.0,
        sink_logits=None if is_plain else s_aux,
    )
    return output.transpose(1, 2).contiguous(), None


def _exact_mask(*args: Any, **kwargs: Any) -> Tensor:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
