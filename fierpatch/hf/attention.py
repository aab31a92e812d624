"""The attention function and the mask function that a patched model's layers look up by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fierpatch.cache import MARK, LayerCache
from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError, ShapeError, UnsupportedModelError

Attention = Callable[..., tuple[Tensor, Tensor | None]]

_MASK_AT_ONCE = 1 << 26  # elements of a mask that are looked at together


def register(name: str, base: str, settings: FierConfig) -> None:
    """Register the pair of functions of one patch.

    transformers asks for the mask function under the same name as the attention function; without
    one it would pass no mask at all.
    """
    AttentionInterface.register(name, _make_attention(base, settings))
    AttentionMaskInterface.register(name, _make_mask(base, settings.max_query_length))


def unregister(name: str) -> None:
    """Take the pair out again."""
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _make_attention(base: str, settings: FierConfig) -> Attention:
    max_query_length, is_sparse_prefill = settings.max_query_length, settings.prefill == "sparse"

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Retrieval for short queries over one of our layers, else the base implementation.

        Or sparse prefill, for longer ones over a layer with an index.
        """
        layer = _layer_of(key, value)
        is_short = query.shape[2] <= max_query_length
        if is_sparse_prefill and not is_short and layer is not None and not layer.is_dense:
            _check_outputs(base, kwargs)
            _check_bias(module, kwargs)
            visible = to_visible(attention_mask, module, query.shape[2])
            layer.index_prompt(query, key)
            logit_arguments = _logit_arguments(base, query, scaling, kwargs)
            return layer.attend_prompt(query, key, value, visible=visible, **logit_arguments), None
        if layer is not None and is_short:
            if not layer.is_dense:
                _check_retrievable(module, attention_mask, kwargs)
                _check_outputs(base, kwargs)
            if not layer.is_dense or _is_plain(base, attention_mask, kwargs):
                output = layer.attend(
                    query,
                    visible=attention_mask,
                    **_logit_arguments(base, query, scaling, kwargs),
                )
                if output is not None:
                    return output, None
        if is_short:
            attention_mask = _to_base_mask(attention_mask, base, query.dtype)
        base_attention = _base_attention(module, base)
        result = base_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        if layer is not None and not layer.is_dense:
            layer.index_prompt(query, key)
        return result

    return attention


def _make_mask(base: str, max_query_length: int) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        """A boolean mask for short queries over all tokens, else the base's own."""
        q_length = kwargs["q_length"]
        if q_length <= max_query_length and kwargs.get("local_size") is None:
            # With one query a skipped mask means all tokens; with more it would be ambiguous.
            may_skip = kwargs.get("allow_is_causal_skip", True) and q_length == 1
            return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": may_skip})
        return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)

    return mask


def _layer_of(key: Tensor, value: Tensor) -> LayerCache | None:
    """The layer that returned these tensors, if both come from one and untouched."""
    mark: Callable[[], LayerCache | None] | None = getattr(key, MARK, None)
    is_whole = mark is getattr(value, MARK, None)
    return mark() if mark is not None and is_whole else None


def _logit_arguments(
    base: str, query: Tensor, scaling: float | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What becomes of ``q . k`` before the softmax, as our layers take it."""
    # SDPA ignores both, and a patched model must agree with the unpatched one.
    is_sdpa = base == "sdpa"
    return {
        "scale": float(scaling if scaling is not None else query.shape[3] ** -0.5),
        "softcap": 0.0 if is_sdpa else float(kwargs.get("softcap") or 0.0),
        "sink_logits": None if is_sdpa else kwargs.get("s_aux"),
    }


def to_visible(mask: Tensor | None, module: nn.Module, num_queries: int) -> Tensor | None:
    """The base's mask of a prompt as a boolean one, which causality comes on top of.

    A mask of rows that only causality and padding make different is one of padding. To know that,
    the host waits for the device once.

    Args:
        mask: None, padding ``[B, S]``, or ``[B, 1, T, S]``, boolean or added to the logits.
        module: the attention, for messages.
        num_queries: T.

    Returns:
        bool ``[B, 1, T or 1, S]``, or None where every token is visible.

    Raises:
        ShapeError: the mask has another form.
        UnsupportedModelError: it shows tokens that come later, so the model is not causal.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask.bool()[:, None, None]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != num_queries:
        raise ShapeError(
            f"sparse prefill needs a mask [B, 1, {num_queries}, S] or padding [B, S], got one of "
            f'shape {tuple(mask.shape)}: pass such a one, or apply with prefill="dense"'
        )
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    last = visible[:, :, -1:]
    token = torch.arange(visible.shape[3], device=mask.device)
    row = token[visible.shape[3] - num_queries :, None]
    is_later, is_padding = visible.new_zeros(()), visible.new_ones(())
    rows_at_once = max(_MASK_AT_ONCE // visible[:, :, 0].numel(), 1)
    for start in range(0, num_queries, rows_at_once):
        part = slice(start, start + rows_at_once)
        causal = token <= row[part]
        is_later |= (visible[:, :, part] & ~causal).any()
        is_padding &= (visible[:, :, part] == (last & causal)).all()
    has_later, has_padding, is_whole = torch.stack((is_later, is_padding, last.all())).tolist()
    if has_later:
        raise UnsupportedModelError(
            f"{type(module).__name__} was given a mask that lets tokens see later ones, and sparse "
            'prefill is causal: apply with prefill="dense"'
        )
    if not has_padding:
        return visible
    return None if is_whole else last


def _check_bias(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} adds a position bias to its logits, which the key index "
            "cannot score: remove the patch, or run it under handle.disabled()"
        )


def _check_retrievable(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    _check_bias(module, kwargs)
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1):
        raise ShapeError(
            f"retrieval needs a boolean mask [B, 1, T, S], got {mask.dtype} of shape "
            f"{tuple(mask.shape)}: pass a 2-D padding mask or a boolean 4-D one, or decode under "
            "handle.disabled()"
        )


def _check_outputs(base: str, kwargs: dict[str, Any]) -> None:
    if base == "eager" and kwargs.get("output_attentions"):
        raise ConfigError(
            "output_attentions=True asks for a weight for every token, and retrieval computes "
            "those of the chosen ones: ask for it under handle.disabled()"
        )


def _is_plain(base: str, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether a dense layer asks for nothing that its own implementation alone can do."""
    is_simple_mask = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    is_asked = base == "eager" and kwargs.get("output_attentions")
    return is_simple_mask and kwargs.get("position_bias") is None and not is_asked


def _to_base_mask(mask: Tensor | None, base: str, dtype: torch.dtype) -> Tensor | None:
    """Our boolean mask as the base implementation wants it, for a layer that stays dense."""
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or base == "sdpa":
        return mask
    if base == "eager":
        allowed = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask, allowed, torch.finfo(dtype).min)
    return mask[:, 0, -1, :]  # flash attention takes padding alone; it is causal by itself


def _base_attention(module: nn.Module, base: str) -> Attention:
    """The user's own implementation; ``eager`` is in no registry but in each modeling file."""
    if base != "eager":
        return cast(Attention, ALL_ATTENTION_FUNCTIONS[base])
    for cls in type(module).__mro__:
        eager: Attention | None = getattr(
            sys.modules[cls.__module__], "eager_attention_forward", None
        )
        if eager is not None:
            return eager
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager_attention_forward in its modeling file: choose "
        'another implementation, such as model.set_attn_implementation("sdpa")'
    )
