"""What a report holds of each layer and in all, and how it prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB")


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        number: the layer's number in the model.
        kind: ``"sparse"``, ``"dense"``, ``"sliding"`` or ``"other"``.
        reason: why it is of that kind.
        tokens: tokens stored, a row of the batch.
        tokens_attended: tokens attended by a KV head in one decode step.
        bytes_scanned: bytes of index that one decode step reads to score every token.
        bytes_refined: bytes of codes, or of keys, that it reads to score candidates again.
        bytes_attended: bytes of K and V that it attends to.
        bytes_read_dense: bytes that dense attention would read.
        kv_bytes: bytes held for K and V, wherever they are.
        host_bytes: of these, bytes held on the host.
        hot_bytes: bytes held on the device for the rows of an offloaded layer that were selected
            last, and for finding them.
        index_bytes: bytes held for the index.
        key_access_ratio: bytes of index and keys read over the bytes of all keys (FIER, section 3).
        hit_rate: share of the tokens selected that needed no fetching, since the cache was made or
            reset; None where nothing is offloaded, or nothing selected yet. Like the two below of
            steps of one token: longer ones, as assisted decoding has, read all that they select
            from the host.
        bytes_fetched: bytes that a step fetched from the host, ahead or not, the mean over steps.
        prefetch_accuracy: share of what prefetches asked for that was selected then; None where
            there was no prefetch.
        backend: what ran a sparse layer, ``"reference"``, ``"triton"`` or ``"flex"``; empty for
            others, before a run and in an estimate.
    """

    number: int
    kind: str
    reason: str
    tokens: int
    tokens_attended: int
    bytes_scanned: int
    bytes_refined: int
    bytes_attended: int
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

    @property
    def bytes_read(self) -> int:
        """Bytes that one decode step reads: scanned, refined and attended."""
        return self.bytes_scanned + self.bytes_refined + self.bytes_attended


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
    def bytes_scanned(self) -> int:
        """Bytes of index that one decode step reads to score every token."""
        return sum(layer.bytes_scanned for layer in self.layers)

    @property
    def bytes_refined(self) -> int:
        """Bytes of codes, or of keys, that it reads to score candidates again."""
        return sum(layer.bytes_refined for layer in self.layers)

    @property
    def bytes_attended(self) -> int:
        """Bytes of K and V that it attends to."""
        return sum(layer.bytes_attended for layer in self.layers)

    @property
    def bytes_read(self) -> int:
        """Bytes that one decode step reads: scanned, refined and attended."""
        return sum(layer.bytes_read for layer in self.layers)

    @property
    def bytes_read_dense(self) -> int:
        """Bytes of K and V that one dense decode step would read."""
        return sum(layer.bytes_read_dense for layer in self.layers)

    @property
    def read_fraction(self) -> float:
        """Bytes that one decode step reads over those of a dense one; 1 where nothing is stored."""
        return self.bytes_read / self.bytes_read_dense if self.bytes_read_dense else 1.0

    @property
    def reading(self) -> str:
        """What one decode step reads, in words; in parts, of one unit, where not all is K and V."""
        parts = (
            (self.bytes_scanned, "scanned"),
            (self.bytes_refined, "refined"),
            (self.bytes_attended, "attended"),
        )
        unit = _unit(self.bytes_read)
        named = ", ".join(f"{_in_unit(size, unit)} {what}" for size, what in parts if size)
        shown = f" ({named})" if self.bytes_read > self.bytes_attended else ""
        return f"{_readable(self.bytes_read)} a step{shown}, {self.read_fraction:.1%} of dense"

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
        lines.append(
            f"total: reads {self.reading}; holds {_readable(self.kv_bytes)} of KV and "
            f"{_readable(self.index_bytes)} of index"
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
    unit = _unit(num_bytes)
    return f"{_in_unit(num_bytes, unit)} {_UNITS[unit]}"


def _unit(num_bytes: float) -> int:
    """The number among `_UNITS` of that which shows so many bytes best."""
    largest = len(_UNITS) - 1
    return next((unit for unit in range(largest) if num_bytes < 1024 ** (unit + 1)), largest)


def _in_unit(num_bytes: float, unit: int) -> str:
    decimals = (0, 1, 1, 2)[unit]
    return f"{num_bytes / 1024**unit:.{decimals}f}"
