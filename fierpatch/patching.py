"""apply and remove: the patch is a handle that undoes itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import TracebackType
from typing import Any, Never
from uuid import uuid4

from fierpatch.cache import LayerFacts
from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError, FierError, NotYetSupportedError
from fierpatch.hf import attention, support
from fierpatch.hf.cache import FierCache
from fierpatch.hf.generation import prepare_cache
from fierpatch.hf.lookahead import Lookahead, plan
from fierpatch.hf.mlp_chunks import MlpChunks, find_mlps
from fierpatch.hf.pool import StaticPool
from fierpatch.offload import MemoryPool
from fierpatch.report import Report, report

_HANDLE = "_fierpatch_handle"
_PREPARE = "_prepare_cache_for_generation"
_CONTINUOUS = "init_continuous_batching"
_COMPILED = ("_compiled_call", "_last_compile_config")


def apply(model: Any, config: FierConfig | None = None, **options: Any) -> Handle:
    """Patch one model so that decode attends to the best tokens by a key index.

    Prefill runs the model's own attention implementation, densely unless ``prefill="sparse"``. A
    patch that is already on is replaced. Nothing changes if this raises.

    Args:
        model: a decoder-only transformers model in eval mode, or a PEFT, data-parallel or compiled
            wrapper of one.
        config: the settings; None means ``FierConfig(**options)``.
        **options: fields of `FierConfig`, which override those of `config`.

    Returns:
        The handle, also a context manager that removes the patch on exit.

    Raises:
        ConfigError: a bad or unknown option.
        ModelError: the model cannot be patched.

    Example:
        >>> handle = fierpatch.apply(model, budget=1024)
        >>> model.generate(**inputs)
        >>> print(handle.report())
        >>> handle.remove()
    """
    if config is None:
        settings = FierConfig.from_dict(options)
    elif isinstance(config, FierConfig):
        settings = config.replace(**options) if options else config
    else:
        raise ConfigError(
            f"config must be a FierConfig, got {type(config).__name__}: pass options by name, as "
            "in apply(model, budget=1024), or FierConfig.from_dict of a mapping"
        )
    inner = support.unwrap(model)
    earlier = current_handle(inner)
    if earlier is None:
        _check(inner, settings)
    else:
        with earlier.disabled():
            _check(inner, settings)
        earlier.remove()
    handle = Handle(inner, settings)
    handle._attach()
    return handle


def remove(model: Any) -> None:
    """Take the patch off a model; nothing happens where there is none."""
    handle = current_handle(support.unwrap(model))
    if handle is not None:
        handle.remove()


def current_handle(model: Any) -> Handle | None:
    """The handle of the patch on this model, or None."""
    handle: Handle | None = support.unwrap(model).__dict__.get(_HANDLE)
    return handle


class Handle:
    """One patch on one model; returned by `apply`.

    Use as a context manager to remove the patch at the end of a block. The static cache of a
    `generate` stays with the handle for the next one, and so does pinned memory of the host, until
    the patch is removed or disabled.
    """

    def __init__(self, model: Any, config: FierConfig) -> None:
        self.config = config
        # Weak, because the model holds the handle: a cycle would keep its weights after `del`.
        self._model = weakref.ref(model)
        self._name: str | None = None
        self._bases: list[tuple[Any, Any]] = []
        self._stashed: dict[str, Any] = {}
        self._lookahead = Lookahead()
        self._mlp_chunks = MlpChunks()
        self._facts: dict[int, LayerFacts] = {}
        self._pool = StaticPool()
        self._memory = MemoryPool()
        self._clear: weakref.finalize[..., Any] | None = None
        self._is_disabled = False

    def __repr__(self) -> str:
        model = self._model()
        state = "attached to" if self.is_attached else "removed from"
        return f"<fierpatch.Handle {state} {type(model).__name__}: {self.config}>"

    @property
    def model(self) -> Any:
        """The patched transformers model.

        Raises:
            FierError: it was deleted.
        """
        model = self._model()
        if model is None:
            raise FierError("the model of this handle was deleted: apply to a new one")
        return model

    @property
    def is_attached(self) -> bool:
        """Whether the patch is on."""
        return self._name is not None

    def remove(self) -> None:
        """Take the patch off and leave nothing behind; a second call does nothing."""
        self._is_disabled = False
        if self._name is not None:
            self._detach()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model unpatched within a ``with`` block; over a `FierCache` it attends densely."""
        if not self.is_attached:
            yield
            return
        model = self.model
        self._detach()
        self._is_disabled = True
        try:
            yield
        finally:
            # What happens inside the block stays: a removal, or another patch.
            if self._is_disabled and current_handle(model) is None:
                self._attach()
            self._is_disabled = False

    def new_cache(self, max_cache_len: int = 0) -> FierCache:
        """An empty cache for this model, to pass as ``past_key_values``."""
        cache = FierCache(
            self.model.config, self.config, max_cache_len=max_cache_len, memory=self._memory
        )
        self._facts = cache.facts
        return cache

    def report(self, cache: FierCache | None = None) -> Report:
        """What each layer does and why, and the tokens and bytes of the last `generate`.

        Args:
            cache: the cache to report on; None means the last one that `generate` used, which may
                be gone by now.
        """
        facts = self._facts if cache is None else cache.facts
        return report(self.model.config, self.config, facts)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """The handle of a copied model: a patch of its own under a name of its own."""
        original = self.model
        copied = memo.get(id(original))
        if copied is None:
            raise FierError("a handle cannot be copied without its model: deepcopy the model")
        handle = Handle(copied, self.config)
        memo[id(self)] = handle
        if self._name is not None:
            handle._register(self._bases[0][1])
            # Each configuration is copied before the handle is, or copied here and found later.
            for config, base in self._bases:
                duplicate = deepcopy(config, memo)
                duplicate._attn_implementation_internal = handle._name
                handle._bases.append((duplicate, base))
            handle._lookahead = deepcopy(self._lookahead, memo)
            handle._mlp_chunks = deepcopy(self._mlp_chunks, memo)
        return handle

    def __reduce__(self) -> Any:
        raise FierError(
            "a patched model cannot be pickled: remove the patch first, or use save_pretrained"
        )

    def _attach(self) -> None:
        model = self.model
        # Both may fail, where the model was changed.
        hooks, mlps = plan(model, self.config), find_mlps(model, self.config)
        configs = support.attention_configs(model)
        base = configs[0]._attn_implementation or "eager"
        self._register(base)
        self._bases = [(config, config._attn_implementation_internal) for config in configs]
        for config in configs:
            config._attn_implementation_internal = self._name
        # A compiled forward of the unpatched model comes back when the patch goes.
        self._stashed = {
            name: model.__dict__.pop(name) for name in _COMPILED if name in model.__dict__
        }
        self._lookahead = Lookahead(hooks)
        self._mlp_chunks = MlpChunks(mlps, self.config.mlp_chunk)
        model.__dict__[_HANDLE] = self
        model.__dict__[_PREPARE] = self._prepare_cache
        model.__dict__[_CONTINUOUS] = self._refuse_continuous_batching

    def _detach(self) -> None:
        name, self._name = self._name, None
        self._lookahead.remove()
        self._mlp_chunks.remove()
        model = self._model()
        if model is not None:
            for attribute in (_HANDLE, _PREPARE, _CONTINUOUS, *_COMPILED):
                model.__dict__.pop(attribute, None)
            model.__dict__.update(self._stashed)
        for config, base in self._bases:
            # Left alone where the user has chosen another implementation since.
            if config._attn_implementation_internal == name:
                config._attn_implementation_internal = base
        self._bases, self._stashed = [], {}
        if self._clear is not None:
            self._clear()

    def _register(self, base: str) -> None:
        # transformers reads meaning into names with "flash" or "/" in them.
        safe = base.replace("flash_attention_", "fa")
        self._name = f"fier|{safe}|{uuid4().hex[:12]}"
        attention.register(self._name, base, self.config)
        # A model deleted while patched must not leave its functions in the registries, nor its
        # keys and values with whoever keeps the handle.
        self._clear = weakref.finalize(self.model, _clear, self._name, self._pool, self._memory)
        self._clear.atexit = False
        self._memory.open()

    def _refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> Never:
        """Stands in for the entry to ``generate_batch``, which pages K and V its own way."""
        raise NotYetSupportedError(
            "continuous batching keeps K and V in pages that the key index does not read: call it "
            "under handle.disabled(), or use model.generate"
        )

    def _prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Stands in for the model's method of the same purpose; see `prepare_cache`."""
        chosen = self._bases[0][0]._attn_implementation
        if chosen != self._name:
            raise ConfigError(
                f"the attention implementation was set to {chosen!r} after the patch, which leaves "
                "retrieval out: call fierpatch.apply again"
            )
        cache = prepare_cache(
            self.model,
            self.config,
            self._pool,
            self._memory,
            generation_config,
            model_kwargs,
            generation_mode,
            batch_size,
            max_cache_length,
        )
        if cache is not None:
            self._facts = cache.facts


def _check(model: Any, settings: FierConfig) -> None:
    support.check_model(model)
    plan(model, settings)
    find_mlps(model, settings)


def _clear(name: str, pool: StaticPool, memory: MemoryPool) -> None:
    """All that a patch leaves outside its model."""
    attention.unregister(name)
    pool.drop()
    memory.close()
