"""What one layer does and costs, from its place in the model and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fierpatch.cache import LayerFacts
from fierpatch.config import FierConfig
from fierpatch.hf.support import LayerLayout
from fierpatch.hot_set import ASKED, CLOCK, MISSED, PREFETCHED, USED, USEFUL
from fierpatch.ops.arguments import layer_index
from fierpatch.report.table import LayerReport


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer that decide its bytes."""

    heads: int  # rows of the batch times KV heads
    head_dim: int
    value_head_dim: int
    itemsize: int
    kv_bytes: int
    index_bytes: int

    @classmethod
    def of_layout(cls, layer: LayerLayout, like: LayerFacts | None) -> Shape:
        """That of a layer of transformers' own, beside one of ours."""
        if like is None:
            return cls(0, layer.head_dim, layer.head_dim, 0, 0, 0)
        heads = like.batch_size * layer.num_kv_heads
        row = 2 * layer.head_dim * like.itemsize
        length = tokens_seen(layer, int(like.counters[0]))
        return cls(heads, layer.head_dim, layer.head_dim, like.itemsize, heads * row * length, 0)


def layer_report(
    number: int,
    layer: LayerLayout,
    settings: FierConfig,
    shape: Shape,
    length: int,
    backend: str = "",
) -> LayerReport:
    """The report of layer `number`, after so many tokens."""
    key_row, value_row = (size * shape.itemsize for size in (shape.head_dim, shape.value_head_dim))
    seen = tokens_seen(layer, length)
    dense = shape.heads * seen * (key_row + value_row)
    if layer.kind == "full" and number >= settings.dense_layers:
        kind = "sparse"
        reason = describe(settings)
        attended = min(settings.budget, length)
        # With a list a query head, each KV head's rows are read by every list of its group.
        num_lists = layer.num_query_heads // layer.num_kv_heads if settings.per_query_head else 1
        gathered = num_lists * attended
        index = layer_index(settings, layer.head_dim)
        again = key_row if settings.refines_by_keys else index.refined_bytes_per_token
        candidates = num_lists * min(settings.refine * settings.budget, length)
        scanned, refined = length * index.scanned_bytes_per_token, candidates * again
        keys = length * key_row
        ratio = (scanned + refined + gathered * key_row) / keys if keys else 1.0
        read = scanned, refined, gathered * (key_row + value_row)
        scanned_bytes, refined_bytes, attended_bytes = (round(shape.heads * x) for x in read)
    else:
        attended, ratio = seen, 1.0
        scanned_bytes, refined_bytes, attended_bytes = 0, 0, dense
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
        scanned_bytes,
        refined_bytes,
        attended_bytes,
        dense,
        shape.kv_bytes,
        shape.index_bytes,
        ratio,
        backend if kind == "sparse" else "",
    )


def describe(settings: FierConfig) -> str:
    """How sparse layers select: by which index, refined by what, and for which heads."""
    parts = [f"{settings.index} index", f"{settings.bits} bit"]
    if settings.refine:
        by = "the keys" if settings.refines_by_keys else f"{settings.code_bits} bits"
        parts.append(f"{settings.refine} x refined by {by}")
    parts.append(f"one list a {'query' if settings.per_query_head else 'KV'} head")
    return ", ".join(parts)


def tokens_seen(layer: LayerLayout, length: int) -> int:
    """Tokens that the layer sees of so many."""
    return min(length, layer.window) if layer.window else length


def tier(fact: LayerFacts) -> dict[str, Any]:
    """What a report says of an offloaded layer."""
    held = {"host_bytes": fact.host_nbytes, "hot_bytes": fact.hot_nbytes}
    if fact.tally is None:
        return held
    counts = fact.tally.sum((0, 1)).tolist()
    used, missed, prefetched, asked = (counts[x] for x in (USED, MISSED, PREFETCHED, ASKED))
    steps = counts[CLOCK] // max(fact.tally.shape[:2].numel(), 1)
    row = (fact.head_dim + fact.value_head_dim) * fact.itemsize
    return held | {
        "hit_rate": 1 - missed / used if used else None,
        "prefetch_accuracy": counts[USEFUL] / asked if asked else None,
        "bytes_fetched": (missed + prefetched) * row / steps if steps else 0.0,
    }
