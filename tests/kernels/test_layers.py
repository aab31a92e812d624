"""A layer's cache by kernels stores, indexes and attends as one by the reference does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fierpatch import reference
from fierpatch.cache import LayerCache
from fierpatch.config import FierConfig
from fierpatch.errors import BackendError, CapacityError
from kernels.tensors import few
from strategies import seeds

SCALE = 0.125


def pair(is_static: bool, is_dense: bool = False, **settings: object) -> list[LayerCache]:
    """The same layer by the reference and by kernels."""
    return [
        LayerCache(
            FierConfig.from_dict({"budget": 40, "backend": backend, **settings}),
            capacity=1024 if is_static else 0,
            is_static=is_static,
            is_dense=is_dense,
        )
        for backend in ("reference", "triton")
    ]


@few(1)
@given(
    is_static=st.booleans(),
    how=st.sampled_from(
        (
            {"index": "rotated"},
            {"index": "fier"},
            {"refine": 3, "refine_bits": 4},
            {"refine": 3, "refine_bits": "exact"},
        )
    ),
    per_query_head=st.booleans(),
    prompt=st.integers(9, 200),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    removed=st.integers(0, 5),
    seed=seeds(),
)
@example(True, {"index": "rotated"}, False, 510, [1, 3], 3, 0)
@example(False, {"index": "rotated"}, True, 127, [2], 2, 1)
@example(True, {"refine": 2, "refine_bits": 3}, False, 130, [1, 2], 2, 2)
@example(False, {"refine": 2, "refine_bits": "exact", "bits": 2}, False, 150, [1], 1, 3)
def test_kernels_keep_a_layer_as_the_reference_does(
    is_static: bool,
    how: dict[str, object],
    per_query_head: bool,
    prompt: int,
    steps: list[int],
    removed: int,
    seed: int,
) -> None:
    """Through a prompt, steps, a crop, steps, and after a reset once more."""
    generator = torch.Generator().manual_seed(seed)
    layers = pair(is_static, per_query_head=per_query_head, **how)

    def feed(length: int) -> list[torch.Tensor | None]:
        key, value = (torch.randn(1, 2, length, 64, generator=generator) for _ in range(2))
        query = torch.randn(1, 4, length, 64, generator=generator)
        outputs = []
        for layer in layers:
            layer.update(key, value)
            if length > layer.config.max_query_length:
                layer.index_prompt(query)
            else:
                outputs.append(layer.attend(query, visible=None, scale=SCALE))
        return outputs

    for _ in range(2):  # the second time after a reset
        feed(prompt)
        for length in steps:
            ours, theirs = feed(length)
            assert ours is not None
            assert theirs is not None
            assert ours.shape == theirs.shape
        for layer in layers:
            layer.crop(removed)
        feed(1)
        left, right = layers
        assert left.counters.tolist() == right.counters.tolist()
        assert left.num_tokens == right.num_tokens
        for one, other in zip(
            (left.keys, left.values, *left.state),
            (right.keys, right.values, *right.state),
            strict=True,
        ):
            assert torch.equal(one, other)
        for layer in layers:
            layer.reset()
    assert layers[1].facts.backend == "triton"


@pytest.mark.parametrize("is_static", [False, True], ids=["growing", "static"])
def test_with_a_budget_for_all_a_layer_attends_as_dense_attention_does(is_static: bool) -> None:
    torch.manual_seed(0)
    for is_dense in (False, True):
        _, layer = pair(is_static, is_dense, budget=600)
        keys, values = torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64)
        query = torch.randn(2, 6, 300, 64)
        layer.update(keys[:, :, :290], values[:, :, :290])
        if not is_dense:
            layer.index_prompt(query[:, :, :290])
        for start, stop in ((290, 291), (291, 298), (298, 300)):
            layer.update(keys[:, :, start:stop], values[:, :, start:stop])
            output = layer.attend(query[:, :, start:stop], visible=None, scale=SCALE)
            visible = reference.causal_visible(stop - start, stop, keys.device)
            expected = reference.masked_attention(
                query[:, :, start:stop], keys[:, :, :stop], values[:, :, :stop], visible,
                scale=SCALE,
            ).transpose(1, 2)  # fmt: skip
            assert output is not None
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


@few(3)
@given(
    num_groups=st.sampled_from((1, 3, 4, 11)),
    num_queries=st.integers(1, 4),
    length=st.integers(4, 700),
    head_dims=st.sampled_from(((64, 64), (80, 48), (256, 5))),
    softcap=st.sampled_from((0.0, 5.0)),
    has_mask=st.booleans(),
    has_sink=st.booleans(),
    seed=seeds(),
)
@example(4, 1, 640, (64, 64), 0.0, True, False, 0)
@example(3, 4, 4, (80, 48), 5.0, False, True, 0)
def test_attention_over_all_tokens_is_masked_attention(
    num_groups: int,
    num_queries: int,
    length: int,
    head_dims: tuple[int, int],
    softcap: float,
    has_mask: bool,
    has_sink: bool,
    seed: int,
) -> None:
    """The length is read on the device, and rows past it, NaN here, are never read."""
    from fierpatch.kernels import append, attention

    generator = torch.Generator().manual_seed(seed)
    head_dim, value_head_dim = head_dims
    capacity = 768
    keys = torch.full((2, 2, capacity, head_dim), torch.nan)
    values = torch.full((2, 2, capacity, value_head_dim), torch.nan)
    keys[:, :, :length] = torch.randn(2, 2, length, head_dim, generator=generator)
    values[:, :, :length] = torch.randn(2, 2, length, value_head_dim, generator=generator)
    query = torch.randn(2, 2 * num_groups, num_queries, head_dim, generator=generator)
    sinks = torch.randn(2 * num_groups, generator=generator) if has_sink else None
    counters = append.new_counters(keys.device)
    counters[0] = length
    visible = reference.causal_visible(num_queries, length, keys.device)
    mask = None
    if has_mask:
        padding = length // 3
        visible = visible.expand(2, 1, -1, -1).clone()
        visible[1, :, :, :padding] = False
        mask = torch.zeros(2, 1, num_queries, capacity, dtype=torch.bool)
        mask[..., :length] = visible
    found = attention.dense_attention(
        query, keys, values, counters, mask, scale=0.1, softcap=softcap, sink_logits=sinks
    )
    expected = reference.masked_attention(
        query.double(), keys[:, :, :length].double(), values[:, :, :length].double(), visible,
        scale=0.1, softcap=softcap, sink_logits=None if sinks is None else sinks.double(),
    ).transpose(1, 2)  # fmt: skip
    eager = reference.masked_attention(
        query, keys[:, :, :length], values[:, :, :length], visible,
        scale=0.1, softcap=softcap, sink_logits=sinks,
    ).transpose(1, 2)  # fmt: skip
    allowed = 2 * ((eager - expected).abs().max() + 1.2e-7 * expected.abs().max())
    # The cap is a tanh of two exponentials, each rounded.
    allowed += 4 * 1.2e-7 * softcap * expected.abs().max()
    assert (found - expected).abs().max() <= allowed


def test_a_full_static_layer_refuses_and_keeps_what_it_has() -> None:
    _, layer = pair(is_static=True)
    layer.update(torch.ones(1, 2, 1020, 64), torch.ones(1, 2, 1020, 64))
    with pytest.raises(CapacityError, match="max_cache_len"):
        layer.update(torch.ones(1, 2, 5, 64), torch.ones(1, 2, 5, 64))
    assert layer.num_tokens == 1020


def test_bfloat16_is_refused_where_the_interpreter_would_compute_it_wrongly() -> None:
    _, layer = pair(is_static=False)
    key = torch.ones(1, 2, 20, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="bfloat16"):
        layer.update(key, key)
    assert not layer.is_allocated
