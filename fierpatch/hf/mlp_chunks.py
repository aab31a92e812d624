"""A prompt goes through each MLP in parts, so that its widest activations are those of a part."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Never

from torch import Tensor, nn
from transformers import PreTrainedModel

from fierpatch.config import FierConfig
from fierpatch.errors import FierError, UnsupportedModelError

# What projections of an MLP are called that treats every token by itself.
_FORMS = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


class _InParts:
    """The hooks of one MLP: the first does the work in parts, the second hands it on.

    Between them the MLP itself runs, over no tokens. Hooks, because torch takes them off by itself,
    copies them with a model, and lets its compiler see through them.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._output: Tensor | None = None

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        self._output = None  # of a run that failed
        (hidden_states,) = inputs
        if hidden_states.shape[1] <= self.num_tokens:
            return None
        output = hidden_states.new_empty(hidden_states.shape)
        for start in range(0, hidden_states.shape[1], self.num_tokens):
            part = slice(start, start + self.num_tokens)
            output[:, part] = module.forward(hidden_states[:, part])
        self._output = output
        return (hidden_states[:, :0],)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """See `torch.nn.Module.register_forward_hook`."""
        whole, self._output = self._output, None
        return output if whole is None else whole

    def __reduce_ex__(self, protocol: object) -> Never:
        raise FierError(
            "a patched model cannot be pickled: remove the patch first, or use save_pretrained"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _InParts:
        """Its bound methods are copied with the hooks of a module, and have to meet again."""
        copied = _InParts(self.num_tokens)
        memo[id(self)] = copied
        return copied


class MlpChunks:
    """The hooks of one model.

    Args:
        mlps: as `find_mlps` gives them.
        num_tokens: tokens of a part.
    """

    def __init__(self, mlps: Sequence[nn.Module] = (), num_tokens: int = 0) -> None:
        self._handles: list[Any] = []
        for mlp in mlps:
            hooks = _InParts(num_tokens)
            self._handles.append(mlp.register_forward_pre_hook(hooks.before))
            self._handles.append(mlp.register_forward_hook(hooks.after))

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __deepcopy__(self, memo: dict[int, Any]) -> MlpChunks:
        """The hooks of a copied model, which were copied with it."""
        copied = MlpChunks()
        copied._handles = deepcopy(self._handles, memo)
        return copied


def find_mlps(model: PreTrainedModel, settings: FierConfig) -> list[nn.Module]:
    """The MLP of every decoder layer, if `settings` ask for parts.

    Raises:
        UnsupportedModelError: a layer has none that treats every token by itself.
    """
    if not settings.mlp_chunk:
        return []
    decoder = model.get_decoder()
    mlps = []
    for number, layer in enumerate(getattr(decoder, "layers", ())):
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module) or not _is_plain(mlp):
            kind = type(layer if mlp is None else mlp).__name__
            raise UnsupportedModelError(
                f"layer {number} of {type(model).__name__} has {kind} where an MLP of gate_proj, "
                "up_proj and down_proj can be given a prompt in parts: apply with mlp_chunk=0"
            )
        mlps.append(mlp)
    if not mlps:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} does not list its layers, whose MLPs mlp_chunk would give a "
            "prompt in parts: apply with mlp_chunk=0"
        )
    return mlps


def _is_plain(mlp: nn.Module) -> bool:
    names = {name for name, _ in mlp.named_children() if name.endswith("proj")}
    return names in _FORMS and len(inspect.signature(type(mlp).forward).parameters) == 2
