"""Every exception the library raises on purpose.

::

    FierError
    ├── ConfigError (ValueError)          a setting is out of range, unknown, or fights another
    ├── NotYetSupportedError              a planned option that this version cannot honour
    ├── BackendError                      the named backend cannot run here
    ├── ShapeError (ValueError)           a tensor does not fit the index, cache or operator
    ├── ModelError                        the model cannot be patched
    │   ├── UnsupportedModelError         its attention bypasses the interface, or is no index's
    │   └── TrainingModeError             it is in training mode
    ├── CacheError                        a cache was used with what it was not built for
    │   ├── CacheMismatchError            another model's cache, or another batch size
    │   ├── CapacityError                 more tokens than a static cache holds
    │   └── PositionLimitError            more tokens than the model has positions
    ├── HostMemoryError (MemoryError)     the host lacks memory for K and V, or does not pin it
    ├── TokenizerError                    the tokenizer lacks what the call needs
    ├── PromptError (ValueError)          the prompt is empty, unreadable or too long
    ├── CheckpointError                   a model folder or id that cannot be loaded
    ├── DownloadError                     no network, a wrong checksum, a full disk
    └── MissingDependencyError            an optional package is not installed

Each message says what was found, what was wanted and what to do about it.
"""

from __future__ import annotations


class FierError(Exception):
    """Root of every error fierpatch raises on purpose."""


class ConfigError(FierError, ValueError):
    """A setting is out of range, unknown, or fights another setting."""


class NotYetSupportedError(FierError):
    """An option that is planned but that this version cannot honour."""


class BackendError(FierError):
    """The backend named explicitly cannot run on this machine or for this shape."""


class ShapeError(FierError, ValueError):
    """A tensor does not fit the index, the cache or the operator it was given to."""


class ModelError(FierError):
    """The model cannot be patched."""


class UnsupportedModelError(ModelError):
    """The model's attention bypasses the attention interface, or is not of a kind we can index."""


class TrainingModeError(ModelError):
    """The model is in training mode, where dropout would make retrieval meaningless."""


class CacheError(FierError):
    """A cache was used with something it was not built for."""


class CacheMismatchError(CacheError):
    """The cache belongs to another model or to another batch size."""


class CapacityError(CacheError):
    """A static cache was asked to hold more tokens than it was allocated for."""


class PositionLimitError(CacheError):
    """More tokens than the model has positions for."""


class HostMemoryError(FierError, MemoryError):
    """The host has too little memory for keys and values, or does not pin it."""


class TokenizerError(FierError):
    """The tokenizer lacks something the call needs, such as a padding token."""


class PromptError(FierError, ValueError):
    """The prompt is empty, unreadable or longer than the model's context."""


class CheckpointError(FierError):
    """A model folder or id that cannot be loaded."""


class DownloadError(FierError):
    """A download failed: no network, a wrong checksum, or no room on the disk."""


class MissingDependencyError(FierError):
    """An optional dependency is not installed."""
