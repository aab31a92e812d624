"""All that a patch could leave behind on a model or in transformers, as a value to compare."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

REGISTRIES = (AttentionInterface, AttentionMaskInterface)


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Attributes, hooks, children and configurations of the model, and its class.

    Attributes count by name, those of functions and hooks by what they hold too.
    """
    type(model)._can_set_attn_implementation()  # transformers notes the answer on the class
    configs = {id(config): config for config in _configs(model)}
    return {
        "class": (type(model), {base: tuple(vars(base)) for base in type(model).__mro__[:-1]}),
        "attributes": {name: tuple(sorted(m.__dict__)) for name, m in model.named_modules()},
        "children": {
            name: tuple((key, type(child)) for key, child in module._modules.items())
            for name, module in model.named_modules()
        },
        "hooks": {
            (name, attribute): len(hooks)
            for name, module in model.named_modules()
            for attribute, hooks in module.__dict__.items()
            if attribute.endswith("_hooks")
        },
        "configurations": [
            (config.to_dict(), config._attn_implementation) for config in configs.values()
        ],
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "training": model.training,
    }


def registered() -> set[str]:
    """Names in the registries that all models of the process share."""
    names = set()
    for registry in REGISTRIES:
        names |= {f"{registry.__name__}: {name}" for name in registry._global_mapping}
        assert not registry()._local_mapping
    return names


def saved_files(model: PreTrainedModel) -> dict[str, bytes]:
    """The files that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _configs(model: PreTrainedModel) -> list[Any]:
    found = [getattr(module, "config", None) for module in model.modules()]
    return [config for config in [model.config, *found] if config is not None]
