"""The cache that `generate` gets on a patched model."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers.generation.configuration_utils import GenerationMode

from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError, PositionLimitError
from fierpatch.hf.cache import FierCache
from fierpatch.hf.pool import Demand, StaticPool
from fierpatch.hf.support import max_positions
from fierpatch.offload import MemoryPool

_GROWING = (None, "dynamic", "offloaded")
_STATIC = ("static", "offloaded_static")


def prepare_cache(
    model: Any,
    settings: FierConfig,
    pool: StaticPool,
    memory: MemoryPool,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> FierCache | None:
    """Put a `FierCache` into `model_kwargs` where stock generate would put its default cache.

    The standard names keep their meaning: ``cache_implementation`` None and ``"dynamic"`` grow,
    ``"static"`` compiles, ``"offloaded"`` offloads. Static layers come from `pool`, which has
    those of the run before where they fit, and memory of the host from `memory`. A cache that the
    caller passes is used as it is.

    Returns:
        The `FierCache` that generate will use, or None where it uses none.

    Raises:
        PositionLimitError: prompt and new tokens are more than the model has positions for.
        CacheMismatchError: the caller's `FierCache` is of another model or batch size.
        ConfigError: a ``cache_implementation`` that retrieval cannot stand in for.
    """
    limit = max_positions(model.config.get_text_config(decoder=True))
    if limit is not None and max_cache_length > limit:
        raise PositionLimitError(
            f"the prompt and the new tokens are {max_cache_length + 1} tokens, past the model's "
            f"{limit} positions: shorten the prompt or lower max_new_tokens"
        )
    given = model_kwargs.get("past_key_values")
    implementation = generation_config.cache_implementation
    rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
    if given is not None or generation_config.use_cache is False:
        if isinstance(given, FierCache):
            given.check_model(model.config, rows)
        type(model)._prepare_cache_for_generation(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        return given if isinstance(given, FierCache) else None
    if implementation not in (*_GROWING, *_STATIC):
        raise ConfigError(
            f"cache_implementation={implementation!r} keeps K and V in a form that the key index "
            'does not read: use None or "static", or generate under handle.disabled()'
        )
    settings = settings.replace(
        compile=settings.compile or implementation in _STATIC,
        offload=settings.offload or "offloaded" in (implementation or ""),
    )
    is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
    make_cache = partial(FierCache, model.config, settings, memory=memory)
    cache = make_cache()  # grows: the first prompt decides the capacity
    if is_assisted and settings.compile and not cache.is_croppable:
        raise ConfigError(
            "assisted decoding takes rejected tokens back, which transformers' static sliding "
            "layers cannot: generate without a static cache (compile=False)"
        )
    if settings.compile:
        num_tokens = max(max_cache_length, generation_config.max_cache_len or 0)
        # After everything that can fail: until then reports still read the run before.
        cache = pool.lend(
            Demand.of(model, settings, rows),
            num_tokens,
            lambda length: make_cache(max_cache_len=length),
        )
        if generation_config.prefill_chunk_size is not None:
            # generate compiles the chunks too, and a graph cannot allocate what outlives it.
            for store in cache.stores.values():
                store.hands_out_all = True
            shape = model._get_static_cache_init_shape()
            if shape is not None:
                num_kv_heads, head_dim = shape
                cache.early_initialization(
                    rows, num_kv_heads, head_dim, dtype=model.dtype, device=model.device
                )
    if generation_config.is_assistant:
        cache.activate_past_recording()  # type: ignore[no-untyped-call]
    model_kwargs["past_key_values"] = cache
    return cache
