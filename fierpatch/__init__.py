"""Attend to the best tokens of a long context by a 1-bit index of the keys.

    import fierpatch
    fierpatch.apply(model, budget=1024)
    model.generate(...)

Importing this package loads neither transformers nor triton and touches no GPU; the names that
need them load at their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fierpatch.config import FierConfig
from fierpatch.errors import FierError

if TYPE_CHECKING:
    from fierpatch.evaluate.verify import verify
    from fierpatch.hf.cache import FierCache
    from fierpatch.patching import Handle, apply, remove
    from fierpatch.report import estimate

__version__ = "0.1.0"

__all__ = [
    "FierCache",
    "FierConfig",
    "FierError",
    "Handle",
    "__version__",
    "apply",
    "estimate",
    "remove",
    "verify",
]

_LAZY = {
    "FierCache": "fierpatch.hf.cache",
    "Handle": "fierpatch.patching",
    "apply": "fierpatch.patching",
    "estimate": "fierpatch.report",
    "remove": "fierpatch.patching",
    "verify": "fierpatch.evaluate.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fierpatch' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
