"""What a report holds of each layer and in all, and how it prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


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
        bytes_fetched: bytes that a step fetched from the host, ahead or not, the mean over steps.
        prefetch_accuracy: share of what prefetches asked for that was selected then; None where
            there was no prefetch.
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
    prefetch_accuracy: float | None = None


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
        return _mean([layer.hit_rate for layer in self.layers])

    @property
    def prefetch_accuracy(self) -> float | None:
        """Share of what prefetches asked for that was selected then, mean over those layers."""
        return _mean([layer.prefetch_accuracy for layer in self.layers])

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
            if self.prefetch_accuracy is not None:
                line += f", prefetches {self.prefetch_accuracy:.1%}"
            lines.append(line)
        return "\n".join(([self.title] if self.title else []) + [line.rstrip() for line in lines])


def _without_number(layer: LayerReport) -> Iterable[Any]:
    return (layer.kind, layer.reason, layer.backend, layer.tokens, layer.tokens_attended)


def _mean(values: list[float | None]) -> float | None:
    """Of those that there are."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _readable(num_bytes: float) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
