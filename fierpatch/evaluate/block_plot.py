"""A picture of the blocks of keys that sparse prefill attends, over the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError, MissingDependencyError
from fierpatch.flex import Span
from fierpatch.flex.blocks import KEY_BLOCK, QUERY_BLOCK, candidate_blocks
from fierpatch.patching import apply

_WORDS = 4  # tokens that name a block of queries
_INCHES = 0.16  # a row


def prompt_blocks(model: Any, input_ids: Tensor, settings: FierConfig, layer: int) -> Tensor:
    """The blocks of keys that each query head of a layer attends of a prompt.

    Args:
        model: as `fierpatch.apply` takes it.
        input_ids: ``[1, S]``.
        settings: of the patch; the prefill has to be sparse.
        layer: number of the layer.

    Returns:
        bool ``[Hq, blocks of queries, blocks of keys]``.

    Raises:
        ConfigError: the prefill is dense, or the layer's is.
    """
    if settings.prefill != "sparse":
        raise ConfigError(
            f'prefill="{settings.prefill}" chooses no blocks to draw: set prefill="sparse"'
        )
    parts: list[Tensor] = []

    def keep(span: Span, chosen: Tensor) -> None:
        parts.append(chosen[0].cpu())

    with apply(model, settings) as handle, torch.inference_mode():
        cache = handle.new_cache()
        store = cache.stores.get(layer)
        if store is None or store.is_dense:
            sparse = [number for number, each in cache.stores.items() if not each.is_dense]
            raise ConfigError(
                f"layer {layer} chooses no blocks to draw: those that do are {sparse}"
            )
        store.block_observer = keep
        model(input_ids, past_key_values=cache, logits_to_keep=1)
    return torch.cat(parts, 1)


def block_names(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The first words of each block of queries, by which a reader finds it in the text."""
    starts = range(0, len(token_ids), QUERY_BLOCK)
    words = [tokenizer.decode(token_ids[start : start + _WORDS]) for start in starts]
    return [" ".join(each.split()) for each in words]


def plot_blocks(chosen: Tensor, names: Sequence[str], title: str, path: Path) -> float:
    """Draw the blocks of one query head: black is attended, grey left out, white comes later.

    Args:
        chosen: bool ``[blocks of queries, blocks of keys]``, of a prompt that starts its context.
        names: of the rows.
        title: above the picture; the density is added to it.
        path: a file whose ending matplotlib knows, such as .svg or .png.

    Returns:
        The density: the share of the causal blocks that is attended.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            "a picture needs matplotlib, which is not installed: pip install 'fierpatch[plot]'"
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = chosen.shape
    length = columns * KEY_BLOCK
    is_causal = candidate_blocks(Span(length, length, 0, rows, chosen.device))[0, 0]
    density = int(chosen.sum()) / int(is_causal.sum())
    shades = torch.where(chosen, 0.0, torch.where(is_causal, 0.85, 1.0))
    size = max(5.0, 2.5 + _INCHES * columns / 1.5), max(3.0, 1.0 + _INCHES * rows)
    # Not by pyplot, whose figures and choice of a screen are global.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shades.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_yticks(range(rows), names, fontsize=6, parse_math=False)
    axes.set_xlabel(f"blocks of {KEY_BLOCK} keys")
    axes.set_ylabel(f"blocks of {QUERY_BLOCK} queries, by their first words")
    axes.set_title(f"{title}: {density:.0%} of the causal blocks", fontsize=9)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ConfigError(
            f"{path} is of no format that matplotlib {matplotlib.__version__} writes: end its name "
            f"in one of .{', .'.join(sorted(known))}"
        )
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return density
