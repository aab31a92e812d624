"""What the patch does and costs: the report of a run, and the estimate before one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from fierpatch.cache import BUCKET_SIZE, LayerFacts
from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError
from fierpatch.hf.support import LayerLayout, layer_layout
from fierpatch.hot_set import HotSet
from fierpatch.index import nbytes
from fierpatch.ops.operators import layer_index


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        number: the layer's number in the model.
        kind: ``"sparse"``, ``"dense"``, ``"sliding"`` or ``"other"``.
        reason: why it is of that kind.
        tokens: tokens stored, a row of the batch.
        tokens_attended: tokens attended by a KV head in one decode step.
        bytes_read: bytes of index, K and V that one decode step reads.
        bytes_read_dense: bytes that dense attention would read.
        kv_bytes: bytes held for K and V, wherever they are.
        host_bytes: of these, bytes held on the host.
        hot_bytes: bytes held on the device for the rows of an offloaded layer that were selected
            last, and for finding them.
        index_bytes: bytes held for the index.
        key_access_ratio: bytes of index and keys read over the bytes of all keys (FIER, section 3).
        hit_rate: share of the tokens selected that needed no fetching, since the cache was made or
            reset; None where nothing is offloaded, or nothing selected yet.
        bytes_fetched: bytes that a step fetched from the host, the mean over steps.
        backend: what ran a sparse layer, ``"reference"`` or ``"triton"``; empty for others, before
            a run and in an estimate.
    """

    number: int
    kind: str
    reason: str
    tokens: int
    tokens_attended: int
    bytes_read: int
    bytes_read_dense: int
    kv_bytes: int
    index_bytes: int
    key_access_ratio: float
    backend: str = ""
    host_bytes: int = 0
    hot_bytes: int = 0
    hit_rate: float | None = None
    bytes_fetched: float = 0.0


@dataclass(frozen=True)
class Report:
    """Every layer, and their sums; printing it gives a table."""

    layers: list[LayerReport]
    title: str = field(default="", compare=False)

    @property
    def kv_bytes(self) -> int:
        """Bytes held for K and V by all layers."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def host_bytes(self) -> int:
        """Bytes of K and V held on the host."""
        return sum(layer.host_bytes for layer in self.layers)

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device: K and V, index and hot sets."""
        held = self.kv_bytes - self.host_bytes + self.index_bytes
        return held + sum(layer.hot_bytes for layer in self.layers)

    @property
    def bytes_fetched(self) -> float:
        """Bytes that one decode step fetched from the host."""
        return sum(layer.bytes_fetched for layer in self.layers)

    @property
    def hit_rate(self) -> float | None:
        """Share of the tokens selected that needed no fetching, mean over the offloaded layers."""
        rates = [layer.hit_rate for layer in self.layers if layer.hit_rate is not None]
        return sum(rates) / len(rates) if rates else None

    @property
    def index_bytes(self) -> int:
        """Bytes held for the index by all layers."""
        return sum(layer.index_bytes for layer in self.layers)

    @property
    def bytes_read(self) -> int:
        """Bytes that one decode step reads of index, K and V."""
        return sum(layer.bytes_read for layer in self.layers)

    @property
    def bytes_read_dense(self) -> int:
        """Bytes of K and V that one dense decode step would read."""
        return sum(layer.bytes_read_dense for layer in self.layers)

    @property
    def active_fraction(self) -> float:
        """Tokens attended over tokens stored, mean over the sparse layers.

        Nothing is ever evicted: by the definition of "Cache Me If You Can" (arXiv 2506.17121) the
        KV footprint of retrieval is 1.
        """
        ratios = [
            layer.tokens_attended / layer.tokens
            for layer in self.layers
            if layer.kind == "sparse" and layer.tokens
        ]
        return sum(ratios) / len(ratios) if ratios else 1.0

    def __str__(self) -> str:
        header = ("layers", "kind", "attended", "of", "read/step", "KV held", "index", "reason")
        rows = [header]
        for _, group in groupby(self.layers, key=_without_number):
            members = list(group)
            first, last = members[0], members[-1]
            numbers = str(first.number) if first is last else f"{first.number}-{last.number}"
            rows.append(
                (
                    numbers,
                    first.kind,
                    str(first.tokens_attended),
                    str(first.tokens),
                    _readable(sum(layer.bytes_read for layer in members)),
                    _readable(sum(layer.kv_bytes for layer in members)),
                    _readable(sum(layer.index_bytes for layer in members)),
                    ", ".join(filter(None, (first.reason, first.backend))),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        saved = self.bytes_read / self.bytes_read_dense if self.bytes_read_dense else 1.0
        lines.append(
            f"total: reads {_readable(self.bytes_read)} a step, {saved:.1%} of dense; holds "
            f"{_readable(self.kv_bytes)} of KV and {_readable(self.index_bytes)} of index"
        )
        if self.host_bytes:
            line = f"offload: {_readable(self.host_bytes)} of KV on the host, "
            line += f"{_readable(self.device_bytes)} in all on the device"
            if self.hit_rate is not None:
                line += (
                    f"; fetches {_readable(self.bytes_fetched)} a step, hits {self.hit_rate:.1%}"
                )
            lines.append(line)
        return "\n".join(([self.title] if self.title else []) + [line.rstrip() for line in lines])


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
            shape = _Shape.of_layout(layer, next(iter(facts.values()), None))
            layers.append(_layer_report(number, layer, settings, shape, length))
        else:
            shape = _Shape(
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
            found = _layer_report(number, layer, settings, shape, length, backend)
            layers.append(replace(found, **_tier(fact)))
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
            kv_bytes, index_bytes = heads * row * _seen(layer, context), 0
        else:
            kv_bytes = heads * row * capacity
            index_bytes = 0
            if number >= settings.dense_layers:
                index = layer_index(settings, layer.head_dim)
                meta = torch.device("meta")
                state = index.allocate(batch, layer.num_kv_heads, capacity, meta)
                index_bytes = nbytes(index, state)
        shape = _Shape(heads, layer.head_dim, layer.head_dim, dtype.itemsize, kv_bytes, index_bytes)
        found = _layer_report(number, layer, settings, shape, context)
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


def _tier(fact: LayerFacts) -> dict[str, Any]:
    """What a report says of an offloaded layer."""
    held = {"host_bytes": fact.host_nbytes, "hot_bytes": fact.hot_nbytes}
    if fact.tally is None:
        return held
    steps, used, missed, prefetched, _ = fact.tally.sum((0, 1)).tolist()
    steps //= max(fact.tally.shape[:2].numel(), 1)
    row = (fact.head_dim + fact.value_head_dim) * fact.itemsize
    rate = 1 - missed / used if used else None
    return held | {
        "hit_rate": rate,
        "bytes_fetched": (missed + prefetched) * row / steps if steps else 0.0,
    }


@dataclass(frozen=True)
class _Shape:
    heads: int  # rows of the batch times KV heads
    head_dim: int
    value_head_dim: int
    itemsize: int
    kv_bytes: int
    index_bytes: int

    @classmethod
    def of_layout(cls, layer: LayerLayout, like: LayerFacts | None) -> _Shape:
        if like is None:
            return cls(0, layer.head_dim, layer.head_dim, 0, 0, 0)
        heads = like.batch_size * layer.num_kv_heads
        row = 2 * layer.head_dim * like.itemsize
        length = _seen(layer, int(like.counters[0]))
        return cls(heads, layer.head_dim, layer.head_dim, like.itemsize, heads * row * length, 0)


def _layer_report(
    number: int,
    layer: LayerLayout,
    settings: FierConfig,
    shape: _Shape,
    length: int,
    backend: str = "",
) -> LayerReport:
    key_row, value_row = (size * shape.itemsize for size in (shape.head_dim, shape.value_head_dim))
    seen = _seen(layer, length)
    dense = shape.heads * seen * (key_row + value_row)
    if layer.kind == "full" and number >= settings.dense_layers:
        kind = "sparse"
        lists = f"one list a {'query' if settings.per_query_head else 'KV'} head"
        reason = f"{settings.index} index, {settings.bits} bit, {_refined(settings)}{lists}"
        attended = min(settings.budget, length)
        # With a list a query head, each KV head's rows are read by every list of its group.
        num_lists = layer.num_query_heads // layer.num_kv_heads if settings.per_query_head else 1
        gathered = num_lists * attended
        index = layer_index(settings, layer.head_dim)
        again = key_row if settings.refines_by_keys else index.refined_bytes_per_token
        candidates = num_lists * min(settings.refine * settings.budget, length)
        scanned = length * index.scanned_bytes_per_token + candidates * again
        read = round(shape.heads * (scanned + gathered * (key_row + value_row)))
        ratio = (scanned + gathered * key_row) / (length * key_row) if length * key_row else 1.0
    else:
        attended, read, ratio = seen, dense, 1.0
        if layer.kind == "full":
            kind, reason = "dense", f"one of the first dense_layers={settings.dense_layers}"
        elif layer.kind == "sliding":
            kind, reason = "sliding", f"sees {layer.window} tokens; transformers' own cache"
        else:
            kind, reason = "other", "not full attention; transformers' own cache"
    return LayerReport(
        number,
        kind,
        reason,
        length,
        attended,
        read,
        dense,
        shape.kv_bytes,
        shape.index_bytes,
        ratio,
        backend if kind == "sparse" else "",
    )


def _refined(settings: FierConfig) -> str:
    if not settings.refine:
        return ""
    by = "the keys" if settings.refines_by_keys else f"{settings.code_bits} bits"
    return f"{settings.refine} x refined by {by}, "


def _seen(layer: LayerLayout, length: int) -> int:
    return min(length, layer.window) if layer.window else length


def _without_number(layer: LayerReport) -> Iterable[Any]:
    return (layer.kind, layer.reason, layer.backend, layer.tokens, layer.tokens_attended)


def _readable(num_bytes: float) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
