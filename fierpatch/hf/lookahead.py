"""What the next layer will ask for, estimated from what enters the layer before it."""

from __future__ import annotations

import ast
import inspect
import re
import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Never

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fierpatch.config import FierConfig
from fierpatch.errors import FierError, UnsupportedModelError
from fierpatch.hf.cache import FierCache, FierLayer
from fierpatch.hf.source import passed
from fierpatch.hf.support import layer_layout

_HEADS = "(*hidden_states.shape[:-1], -1, self.head_dim)"
_SPLITS = (  # a projection into heads, as it is written
    f".view({_HEADS})",
    f".view(*{_HEADS})",
    ".view(hidden_states.size()[0], hidden_states.size()[1], -1, self.head_dim)",
    ".view(hidden_states.size()[0], hidden_states.size()[1], self.num_heads, self.head_dim)",
)
_PROJECTED = r"self\.q_proj\(hidden_states\)"
_SPLIT = r"\.split\(\)"
_TRANSPOSED = r"\.transpose\(1, 2\)"
# Before RoPE, with the name of a norm over each head or over all of them.
_QUERIES = tuple(
    re.compile(query)
    for query in (
        rf"{_PROJECTED}{_SPLIT}{_TRANSPOSED}",
        rf"self\.(?P<heads>\w+)\({_PROJECTED}{_SPLIT}\){_TRANSPOSED}",
        rf"self\.(?P<heads>\w+)\({_PROJECTED}{_SPLIT}{_TRANSPOSED}\)",
        rf"self\.(?P<whole>\w+)\({_PROJECTED}\){_SPLIT}{_TRANSPOSED}",
    )
)
_ENTERED = re.compile(r"hidden_states|self\.(?P<norm>\w+)\(hidden_states\)")
_ROTATE = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class _Form:
    """How a layer makes the query of its attention; names are those of its modules."""

    attention: str
    input_norm: str | None
    norm_of_heads: str | None
    norm_of_all: str | None
    rotate: Callable[..., tuple[Tensor, Tensor]] | None


class NextQuery:
    """A forward pre-hook of one decoder layer, which has the layer after it fetch ahead.

    Does nothing but where a single token decodes over an offloaded layer of our own cache.

    Args:
        number: of the layer after it.
        layer: that layer.
        form: how it makes its query.
        rotary: gives the position embeddings of that layer, where they are of another kind than
            those of the layer before it.
        layer_type: that kind.
    """

    def __init__(
        self,
        number: int,
        layer: nn.Module | None,
        form: _Form,
        rotary: nn.Module | None = None,
        layer_type: str | None = None,
    ) -> None:
        self.number = number
        self.layer = layer
        self.form = form
        self.rotary = rotary
        self.layer_type = layer_type

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Runs before the layer; see `torch.nn.Module.register_forward_pre_hook`."""
        cache = options.get("past_key_values")
        if self.layer is None or not isinstance(cache, FierCache):
            return
        # A cache of another model's is refused where it is updated.
        following = cache.layers[self.number] if self.number < len(cache.layers) else None
        if not isinstance(following, FierLayer):
            return
        store = following.store
        if not (store.is_offloaded and store.is_allocated and store.config.prefetch):
            return
        hidden_states: Tensor = inputs[0] if inputs else options["hidden_states"]
        if hidden_states.shape[1] != 1:
            return
        with torch.no_grad():
            device = store.state[0].device  # a model may be spread over several
            store.prefetch(self._estimate(self.layer, hidden_states.to(device), options))

    def _estimate(self, layer: nn.Module, hidden_states: Tensor, options: dict[str, Any]) -> Tensor:
        """``[B, Hq, 1, D]``, as if the layer before changed nothing."""
        form = self.form
        attention: Any = getattr(layer, form.attention)
        if form.input_norm is not None:
            hidden_states = getattr(layer, form.input_norm)(hidden_states)
        query: Tensor = attention.q_proj(hidden_states)
        if form.norm_of_all is not None:
            query = getattr(attention, form.norm_of_all)(query)
        query = query.view(*hidden_states.shape[:-1], -1, attention.head_dim)
        if form.norm_of_heads is not None:
            query = getattr(attention, form.norm_of_heads)(query)
        query = query.transpose(1, 2)
        if form.rotate is None:
            return query
        if self.rotary is None:
            cosines, sines = options["position_embeddings"]
        else:
            cosines, sines = self.rotary(hidden_states, options["position_ids"], self.layer_type)
        cosines, sines = cosines.to(query.device), sines.to(query.device)
        return form.rotate(query, query[:, :1], cosines, sines)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> NextQuery:
        """Without a layer: `Lookahead` hooks a copied model anew, and a part has no patch.

        To copy the layer from here would also go as deep as the model has layers.
        """
        return NextQuery(self.number, None, self.form)

    def copied(self, memo: dict[int, Any]) -> NextQuery:
        """The same for the copied model of `memo`."""
        layer, rotary = deepcopy(self.layer, memo), deepcopy(self.rotary, memo)
        return NextQuery(self.number, layer, self.form, rotary, self.layer_type)

    def __reduce__(self) -> Never:
        raise FierError(
            "a patched model cannot be pickled: remove the patch first, or use save_pretrained"
        )


class Lookahead:
    """The hooks by which the layers of one model fetch ahead, each for the layer after it.

    Args:
        hooks: decoder layers and what to hook to each, as `plan` gives them.
    """

    def __init__(self, hooks: Sequence[tuple[nn.Module, NextQuery]] = ()) -> None:
        # Weak, as the handle of a deleted model must not keep its weights.
        self._hooks = [
            (
                weakref.ref(layer),
                weakref.ref(hook),
                layer.register_forward_pre_hook(hook, with_kwargs=True),
            )
            for layer, hook in hooks
        ]

    def remove(self) -> None:
        """Take every hook off."""
        for _, _, handle in self._hooks:
            handle.remove()
        self._hooks = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Lookahead:
        """The hooks of a copied model, each for the copied layer after it."""
        hooks = []
        for layer, hook, handle in self._hooks:
            original, estimate = layer(), hook()
            if original is None or estimate is None:
                continue  # the model has lost a layer since
            copied = deepcopy(original, memo)
            deepcopy(handle, memo).remove()  # the hook that was copied with it
            hooks.append((copied, estimate.copied(memo)))
        return Lookahead(hooks)


def plan(model: PreTrainedModel, settings: FierConfig) -> list[tuple[nn.Module, NextQuery]]:
    """What to hook to which decoder layer; nothing where `settings` do not ask for it.

    Every layer whose K and V will be on the host is fetched for by the layer before it, of
    whatever kind that is. The first layer has none before it.

    Raises:
        UnsupportedModelError: the query of such a layer cannot be estimated.
    """
    if not settings.prefetch:
        return []
    config = model.config.get_text_config(decoder=True)
    wanted = [
        number
        for number, layout in enumerate(layer_layout(config))
        if layout.kind == "full" and number >= max(settings.dense_layers, 1)
    ]
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    hooks = []
    for number in wanted:
        try:
            if not isinstance(layers, nn.ModuleList) or number >= len(layers):
                raise LookupError(f"{type(decoder).__name__} does not list its layers")
            form = _form(layers[number], number)
            rotary = _rotary(decoder, config, number) if form.rotate is not None else None
        except LookupError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not let the query of layer {number} be estimated "
                f"before it runs ({error}): apply with prefetch=False"
            ) from error
        layer_type = config.layer_types[number] if rotary is not None else None
        hook = NextQuery(number, layers[number], form, rotary, layer_type)
        hooks.append((layers[number - 1], hook))
    return hooks


def _form(layer: nn.Module, number: int) -> _Form:
    names = [
        name
        for name, module in layer.named_children()
        if getattr(module, "layer_idx", None) == number and hasattr(module, "q_proj")
    ]
    if len(names) != 1:
        raise LookupError(f"{type(layer).__name__} has no one attention with a q_proj")
    if any(weight.is_meta for weight in layer.parameters()):
        raise LookupError("its weights are not on a device between steps")
    attention = layer.get_submodule(names[0])
    entered = passed(layer, f"self.{names[0]}", 0, "hidden_states")
    before = _ENTERED.fullmatch(ast.unparse(entered))
    query, is_rotated = _unrotated(passed(attention, "attention_interface", 1))
    written = ast.unparse(query)
    for split in _SPLITS:
        written = written.replace(split, ".split()")
    made = next(filter(None, (form.fullmatch(written) for form in _QUERIES)), None)
    if before is None or made is None:
        raise LookupError(f"{type(attention).__name__} makes it in a way unknown here")
    norms = made.groupdict()
    rotate = _globals(attention)[_ROTATE] if is_rotated else None
    return _Form(names[0], before["norm"], norms.get("heads"), norms.get("whole"), rotate)


def _unrotated(query: ast.expr) -> tuple[ast.expr, bool]:
    """The expression that RoPE is applied to, and whether it is."""
    match query:
        case ast.Subscript(
            value=ast.Call(func=ast.Name(id=name), args=[inner, _, cosines, sines], keywords=[]),
            slice=ast.Constant(value=0),
        ) if name == _ROTATE:
            embeddings = [ast.unparse(cosines), ast.unparse(sines)]
            if embeddings == ["position_embeddings[0]", "position_embeddings[1]"]:
                return inner, True
    return query, False


def _globals(attention: nn.Module) -> dict[str, Any]:
    """Those of the file that has the forward, which may be another than the class's."""
    forward: Any = inspect.unwrap(type(attention).forward)
    names: dict[str, Any] = forward.__globals__
    return names


def _rotary(decoder: nn.Module, config: Any, number: int) -> nn.Module | None:
    """What makes the position embeddings of a layer, if those of the layer before are others."""
    rotary = getattr(decoder, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise LookupError(f"{type(decoder).__name__} has no rotary_emb")
    has_kinds = "layer_type" in inspect.signature(rotary.forward).parameters
    kinds = getattr(config, "layer_types", None)
    if not has_kinds or kinds is None or kinds[number - 1] == kinds[number]:
        return None
    return rotary
