"""The report of a run, and the estimate before one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fierpatch.cache import BUCKET_SIZE, LayerFacts
from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError
from fierpatch.hf.support import layer_layout
from fierpatch.hot_set import HotSet
from fierpatch.index import nbytes
from fierpatch.ops.arguments import layer_index
from fierpatch.report.layers import Shape, layer_report, tier, tokens_seen
from fierpatch.report.table import Report


def report(model_config: Any, settings: FierConfig, facts: dict[int, LayerFacts]) -> Report:
    """The report of a run from the numbers its cache left, all zero before the first run.

    Args:
        model_config: the model's transformers configuration.
        settings: the settings of the patch.
        facts: `FierCache.facts`.
    """
    layout = layer_layout(model_config.get_text_config(decoder=True))
    lengths = [int(fact.counters[0]) for fact in facts.values()]
    layers = []
    for number, layer in enumerate(layout):
        fact = facts.get(number)
        if fact is None:
            # A layer of transformers' own: as long as ours, and as wide as the configuration says.
            length = max(lengths, default=0)
            shape = Shape.of_layout(layer, next(iter(facts.values()), None))
            layers.append(layer_report(number, layer, settings, shape, length))
        else:
            shape = Shape(
                fact.batch_size * fact.num_kv_heads,
                fact.head_dim,
                fact.value_head_dim,
                fact.itemsize,
                fact.kv_nbytes,
                fact.index_nbytes,
            )
            length = int(fact.counters[0])
            # Until something is stored, no backend has been chosen.
            backend = fact.backend if fact.batch_size else ""
            found = layer_report(number, layer, settings, shape, length, backend)
            layers.append(replace(found, **tier(fact)))
    return Report(layers)


def estimate(
    config: Any,
    context: int,
    batch: int = 1,
    *,
    dtype: torch.dtype | str | None = None,
    settings: FierConfig | None = None,
    **options: Any,
) -> Report:
    """The bytes a context needs and a step reads, before anything is allocated.

    Args:
        config: a transformers configuration, or a model that has one.
        context: tokens a row, prompt and generated.
        batch: rows.
        dtype: of K and V; None means the model's or the configuration's, or bfloat16 where that
            states none.
        settings: the settings of the patch; None means ``FierConfig(**options)``.
        **options: fields of `FierConfig`.

    Returns:
        A `Report` of every layer; printing it gives a table.

    Raises:
        ConfigError: `context` or `batch` is not positive, or an option is bad.
    """
    sizes: dict[str, object] = {"context": context, "batch": batch}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} must be a positive integer")
    if settings is None:
        settings = FierConfig.from_dict(options)
    elif options:
        settings = settings.replace(**options)
    model_config = getattr(config, "config", config)
    text_config = model_config.get_text_config(decoder=True)
    if dtype is None:
        dtype = getattr(config, "dtype", None) or text_config.dtype or torch.bfloat16
    named = dtype
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={named!r} is not a torch dtype: use one such as torch.bfloat16")
    capacity = -(-context // BUCKET_SIZE) * BUCKET_SIZE
    layers = []
    for number, layer in enumerate(layer_layout(text_config)):
        heads = batch * layer.num_kv_heads
        row = 2 * layer.head_dim * dtype.itemsize
        if layer.kind != "full":
            kv_bytes, index_bytes = heads * row * tokens_seen(layer, context), 0
        else:
            kv_bytes = heads * row * capacity
            index_bytes = 0
            if number >= settings.dense_layers:
                index = layer_index(settings, layer.head_dim)
                meta = torch.device("meta")
                state = index.allocate(batch, layer.num_kv_heads, capacity, meta)
                index_bytes = nbytes(index, state)
        shape = Shape(heads, layer.head_dim, layer.head_dim, dtype.itemsize, kv_bytes, index_bytes)
        found = layer_report(number, layer, settings, shape, context)
        if settings.offload and found.kind == "sparse":
            num_lists = layer.num_query_heads if settings.per_query_head else layer.num_kv_heads
            like = torch.empty(0, dtype=dtype, device="meta")
            lead = (settings.hot_rows, capacity, batch, num_lists)
            hot = HotSet.empty(*lead, 2 * layer.head_dim, like)
            found = replace(found, host_bytes=kv_bytes, hot_bytes=hot.nbytes)
        layers.append(found)
    name = getattr(text_config, "model_type", "model")
    return Report(
        layers, title=f"{name}: {context} tokens, batch {batch}, {str(dtype).split('.')[-1]}"
    )
