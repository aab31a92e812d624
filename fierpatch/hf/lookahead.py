"""What the next layer will ask for, estimated from what enters the layer before it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, Never

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fierpatch.cache import LayerCache
from fierpatch.config import FierConfig
from fierpatch.errors import FierError, UnsupportedModelError
from fierpatch.hf.cache import FierCache, FierLayer
from fierpatch.hf.support import LayerLayout, layer_layout
from fierpatch.query_estimate import QueryEstimate

_AFTER_ATTENTION = ("mlp", "feed_forward", "block_sparse_moe")  # names in a decoder layer
# Their full-attention layers have no RoPE, and say so by no attribute alike.
_WITHOUT_ROPE = ("afmoe", "cohere2", "cohere2_moe", "exaone_moe")


class _Form(NamedTuple):
    """How a layer makes the query of its attention."""

    attention: str  # the name of that module
    head_dim: int
    norm_size: int  # of its q_norm: one head, all heads, or 0 for none
    rotate: Callable[..., tuple[Tensor, Tensor]] | None
    rotary_type: str | None  # of its position embeddings, where the layer before has others


class NextQuery:
    """A forward pre-hook of one decoder layer, which has the layer after it fetch ahead.

    Does nothing but where a single token decodes over an offloaded layer of our own cache.
    `number`, `form` and `layer` are those of the layer after it; `rotary` is the decoder's.
    `has_twin` says that the layer's own query was estimated by the same RoPE, `has_start` that
    `FetchStart` says when to fetch.
    """

    def __init__(
        self,
        number: int,
        form: _Form,
        layer: Any = None,
        rotary: Any = None,
        *,
        has_twin: bool = False,
    ) -> None:
        self.number = number
        self.form = form
        self.layer = layer
        self.rotary = rotary
        self.has_twin = has_twin
        self.has_start = False
        # For `FetchStart`, which a step that is broken off does not reach.
        self.waiting: weakref.ref[LayerCache] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Runs before the layer; see `torch.nn.Module.register_forward_pre_hook`."""
        cache = options.get("past_key_values")
        hidden_states: Tensor = inputs[0] if inputs else options["hidden_states"]
        if self.layer is None or not isinstance(cache, FierCache) or hidden_states.shape[1] != 1:
            return
        # A cache of another model's is refused where it is updated.
        following = cache.layers[self.number] if self.number < len(cache.layers) else None
        if not isinstance(following, FierLayer):
            return
        store = following.store
        if store.is_offloaded and store.is_allocated and store.config.prefetch:
            with torch.no_grad():
                device = store.state[0].device  # a model may be spread over several
                rotation = self._known_rotation(cache) if self.has_twin else None
                store.fetches_on_call = self.has_start
                store.prefetch(self._estimate(hidden_states.to(device), options, rotation))
                self.waiting = store.mark if self.has_start else None

    def _known_rotation(self, cache: FierCache) -> Tensor | None:
        """The matrix by which the layer's own query was estimated."""
        own = cache.layers[self.number - 1]
        expected = own.store.expected if isinstance(own, FierLayer) else None
        return expected.rotation if expected is not None else None

    def _estimate(
        self, hidden_states: Tensor, options: dict[str, Any], rotation: Tensor | None
    ) -> QueryEstimate:
        """As if the layer before changed nothing."""
        name, head_dim, norm_size, rotate, _ = self.form
        attention: Any = getattr(self.layer, name)
        hidden_states = self.layer.input_layernorm(hidden_states)
        if rotate is not None and not norm_size and _is_linear(attention.q_proj, hidden_states):
            # All that follows is linear, so it can wait for a stream beside the model's own.
            if rotation is None or rotation.device != hidden_states.device:
                rotation = self._rotation(hidden_states, options)
            projection = attention.q_proj
            return QueryEstimate(hidden_states, projection.weight, projection.bias, rotation)
        query: Tensor = attention.q_proj(hidden_states)
        if norm_size > head_dim:
            query = attention.q_norm(query)
        query = query.view(*hidden_states.shape[:-1], -1, head_dim)
        if norm_size == head_dim:
            query = attention.q_norm(query)
        query = query.transpose(1, 2)
        if rotate is not None:
            query = self._rotated(query, hidden_states, options)
        return QueryEstimate(query)

    def _rotation(self, like: Tensor, options: dict[str, Any]) -> Tensor:
        """``[B, D, D]``: what RoPE makes of each channel."""
        channels = torch.eye(self.form.head_dim, dtype=like.dtype, device=like.device)
        channels = channels[None, :, None].expand(len(like), -1, -1, -1)
        return self._rotated(channels, like, options)[:, :, 0].to(like.dtype)

    def _rotated(self, query: Tensor, hidden_states: Tensor, options: dict[str, Any]) -> Tensor:
        """``[B, Hq, 1, D]`` after RoPE."""
        rotate, rotary_type = self.form.rotate, self.form.rotary_type
        assert rotate is not None
        if rotary_type is None:
            cosines, sines = options["position_embeddings"]
        else:
            cosines, sines = self.rotary(hidden_states, options["position_ids"], rotary_type)
        cosines, sines = cosines.to(query.device), sines.to(query.device)
        return rotate(query, query[:, :1], cosines, sines)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> NextQuery:
        """Without a layer: `Lookahead` hooks a copied model anew, and a part has no patch.

        To copy the layer from here would also go as deep as the model has layers.
        """
        return NextQuery(self.number, self.form)

    def __reduce__(self) -> Never:
        raise FierError(
            "a patched model cannot be pickled: remove the patch first, or use save_pretrained"
        )


class FetchStart:
    """A forward pre-hook of what follows a layer's attention, whose weights are read meanwhile.

    Looking up pages of the host holds up every kernel that begins then. What reads weights for long
    is held up once, and the small kernels between it and the attention are not.
    """

    def __init__(self, query: NextQuery | None) -> None:
        self.query = query

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Runs before the module; see `torch.nn.Module.register_forward_pre_hook`."""
        if self.query is None or self.query.waiting is None or not inputs:
            return
        store, self.query.waiting = self.query.waiting(), None
        if store is None:
            return
        before: Tensor = inputs[0]
        # Named as changed to the compiler, which autograd would take at its word.
        store.fetch_placed(None if before.requires_grad else before)

    def __deepcopy__(self, memo: dict[int, Any]) -> FetchStart:
        """Without a query, see `NextQuery`."""
        return FetchStart(None)


class Lookahead:
    """The hooks of one model, as `plan` gives them: decoder layers and what to hook to each."""

    def __init__(self, hooks: Sequence[tuple[nn.Module, NextQuery]] = ()) -> None:
        # Weak, as the handle of a deleted model must not keep its weights.
        self._hooks = []
        self._starts: list[RemovableHandle] = []
        for layer, hook in hooks:
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            self._hooks.append((weakref.ref(layer), weakref.ref(hook), handle))
            after = _after_attention(layer)
            hook.has_start = after is not None
            if after is not None:
                self._starts.append(
                    after.register_forward_pre_hook(FetchStart(hook), with_kwargs=True)
                )

    def remove(self) -> None:
        """Take every hook off."""
        for handle in (*(each[2] for each in self._hooks), *self._starts):
            handle.remove()
        self._hooks, self._starts = [], []

    def __deepcopy__(self, memo: dict[int, Any]) -> Lookahead:
        """The hooks of a copied model, each for the copied layer after it."""
        hooks = []
        for layer, hook, handle in self._hooks:
            original, estimate = layer(), hook()
            if original is None or estimate is None:
                continue  # the model has lost a layer since
            copied = deepcopy(original, memo)
            deepcopy(handle, memo).remove()  # the hook that was copied with it
            parts = deepcopy(estimate.layer, memo), deepcopy(estimate.rotary, memo)
            following = estimate.number, estimate.form, *parts
            hooks.append((copied, NextQuery(*following, has_twin=estimate.has_twin)))
        for handle in self._starts:
            deepcopy(handle, memo).remove()
        return Lookahead(hooks)


def plan(model: PreTrainedModel, settings: FierConfig) -> list[tuple[nn.Module, NextQuery]]:
    """What to hook to the layer before each whose K and V are on the host, if `settings` ask so.

    Raises:
        UnsupportedModelError: the query of such a layer cannot be estimated.
    """
    if not settings.prefetch:
        return []
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    layers: Any = getattr(decoder, "layers", ())
    rotary = getattr(decoder, "rotary_emb", None)
    hooks: list[tuple[nn.Module, NextQuery]] = []
    for number, layout in enumerate(layer_layout(config)):
        if layout.kind != "full" or number < max(settings.dense_layers, 1):
            continue
        try:
            if number >= len(layers):
                raise LookupError(f"{type(decoder).__name__} does not list its layers")
            form = _form(layers[number], number, layout, rotary, config)
        except LookupError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not let the query of layer {number} be estimated "
                f"before it runs ({error}): apply with prefetch=False"
            ) from error
        known = [(hook.number, hook.form) for _, hook in hooks if form.rotary_type is None]
        has_twin = (number - 1, form) in known
        hook = NextQuery(number, form, layers[number], rotary, has_twin=has_twin)
        hooks.append((layers[number - 1], hook))
    return hooks


def _after_attention(layer: nn.Module) -> nn.Module | None:
    """What a decoder layer hands its attention's output to, whatever is between, if that is known.

    Or its own input, where both run side by side.
    """
    found = [getattr(layer, name, None) for name in _AFTER_ATTENTION]
    return next((each for each in found if isinstance(each, nn.Module)), None)


def _is_linear(projection: nn.Module, like: Tensor) -> bool:
    """Whether it is a plain one for such tensors, that nothing is hooked to."""
    if type(projection) is not nn.Linear:
        return False
    is_alike = projection.weight.dtype == like.dtype and projection.weight.device == like.device
    return is_alike and not projection._forward_hooks and not projection._forward_pre_hooks


def _form(layer: nn.Module, number: int, layout: LayerLayout, rotary: Any, config: Any) -> _Form:
    names = [
        name
        for name, module in layer.named_children()
        if getattr(module, "layer_idx", None) == number and hasattr(module, "q_proj")
    ]
    if len(names) != 1 or not hasattr(layer, "input_layernorm"):
        raise LookupError(f"{type(layer).__name__} has no one q_proj after an input_layernorm")
    if any(weight.is_meta for weight in layer.parameters()):
        raise LookupError("its weights are not on a device between steps")
    attention: Any = getattr(layer, names[0])
    owner, head_dim = type(attention).__name__, layout.head_dim
    others = [name for name, _ in attention.named_children() if name.startswith("q")]
    size = layout.num_query_heads * head_dim
    if getattr(attention.q_proj, "out_features", None) != size:  # with a gate, say
        raise LookupError(f"the q_proj of {owner} is not {size} wide")
    if {*others} - {"q_proj", "q_norm"} or hasattr(attention, "rotary_ndims"):
        raise LookupError(f"{owner} makes it of more than q_proj, q_norm and RoPE")
    norm = getattr(attention, "q_norm", None)
    weight = getattr(norm, "weight", None)
    norm_size = 0 if norm is None else head_dim if weight is None else weight.shape[-1]
    if norm_size not in (0, head_dim, size):
        raise LookupError(f"the q_norm of {owner} is {norm_size} wide")
    if config.model_type in _WITHOUT_ROPE or not getattr(attention, "use_rope", True):
        return _Form(names[0], head_dim, norm_size, None, None)
    forward: Any = inspect.unwrap(type(attention).forward)  # maybe of another file than the class
    rotate = forward.__globals__.get("apply_rotary_pos_emb")
    takes = list(inspect.signature(rotate).parameters) if rotate else []
    if takes[:4] != ["q", "k", "cos", "sin"] or not isinstance(rotary, nn.Module):
        raise LookupError(f"{owner} has no RoPE of the usual form")
    has_types = "layer_type" in inspect.signature(rotary.forward).parameters
    types = config.layer_types[number - 1 : number + 1] if has_types else []
    rotary_type = types[1] if len(set(types)) > 1 else None
    return _Form(names[0], head_dim, norm_size, rotate, rotary_type)
