"""FierConfig: every knob of the library, checked once and frozen."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fierpatch.errors import ConfigError

INDEXES = ("rotated", "fier")
BACKENDS = ("auto", "triton", "reference", "flex")
PREFILLS = ("dense", "sparse")
PREFILL_SCORES = ("index", "keys")
GROUP_SIZES = (32, 64, 128, 256, 512)  # whole bit planes that divide a tile of the index
REFINE_BITS = (2, 3, 4)  # those of the index's own, which this module cannot import: it loads torch
_MOST = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class FierConfig:
    """Settings of a patched model.

    Args:
        budget: tokens attended per KV head and decode step, sinks and recents included.
        sinks: first visible tokens of every row that are always attended.
        recent: last visible tokens that are always attended; the newest always is, so at least 1.
        index: what stands for a key when scoring: ``"rotated"`` (balanced, rotated sign bits with
            one scale a token) or ``"fier"`` (arXiv 2508.08256: per-channel min/max bits).
        bits: bits a channel of the index, 1 or 2 (2 for ``"rotated"`` only).
        group_size: tokens that share a centre (``"rotated"``) or a scale and zero along each
            channel (``"fier"``); 32, 64, 128, 256 or 512. None means 128 and 32 respectively.
        refine: tokens that are scored a second time, better, before the budget is taken from them,
            in multiples of the budget: 4 brings selection close to that by the keys themselves. 0
            selects by the first scores.
        refine_bits: what the second scores are made of: codes of 2, 3 or 4 bits a channel in all
            (beside the one bit of ``"rotated"``, 16, 32 or 48 bytes more a token and KV head at
            128 channels, and 1), or ``"exact"``: the keys, with any index.
        dense_layers: how many of the model's first layers stay dense (the protocol of Quest and
            FIER; 0 patches every full-attention layer).
        per_query_head: select for every query head on its own instead of once for the query heads
            that share a KV head. Better at equal budget, at up to num_groups times the traffic.
        max_query_length: the longest query that goes through retrieval (decode, and the
            verification step of assisted decoding); longer ones are prefill.
        prefill: how a prompt attends: ``"dense"``, by the model's own attention, or ``"sparse"``:
            every block of queries over the blocks of keys that hold most of its weight, beside
            sinks and recents. Layers without an index stay dense.
        prefill_mass: the part of the estimated weight that sparse prefill holds for every query
            head, above 0 and up to 1. At least `budget` tokens are attended in any case.
        prefill_scores: what sparse prefill weighs blocks by: ``"keys"``, or ``"index"``, which has
            to be turned back into keys first and holds a little less of the weight.
        mlp_chunk: tokens of a prompt that an MLP is given at a time, which bounds its activations,
            the most of what a long prefill takes beside weights, K and V. 0 means all.
        compile: build static caches, so that decode compiles into one graph.
            ``cache_implementation="static"`` in a call of ``generate`` does it for that call.
        offload: keep K and V in pinned host memory, but for those of the dense layers; the index
            stays on the device, with the rows that each list selected last.
            ``cache_implementation="offloaded"`` or ``"offloaded_static"`` does it for one call.
        hot_tokens: how many such rows a list, at least the budget; None means four times the
            budget, with which some 90 % of what a step selects needs no fetching.
        prefetch: fetch ahead what the next layer will probably select, on a stream of its own; the
            result does not depend on it. For `offload`, where steps select mostly other tokens than
            the last one: where a layer's last step had to fetch less than 30 % of its tokens, a
            second scan of the index would cost more than it saves, and is left out.
        backend: which implementation of the operators runs: ``"triton"`` (kernels, on CUDA),
            ``"reference"`` (plain PyTorch, anywhere), ``"auto"`` (Triton where it can run), or
            ``"flex"``: as ``"auto"``, but for the attention, which is FlexAttention's; not with
            `offload`.
        seed: seed of the rotation's random signs.

    Raises:
        ConfigError: a value is out of range or of the wrong type, or two values contradict.
    """

    budget: int = 1024
    sinks: int = 4
    recent: int = 16
    index: str = "rotated"
    bits: int = 1
    group_size: int | None = None
    refine: int = 0
    refine_bits: int | str = 4
    dense_layers: int = 2
    per_query_head: bool = False
    max_query_length: int = 8
    prefill: str = "dense"
    prefill_mass: float = 0.95
    prefill_scores: str = "keys"
    mlp_chunk: int = 0
    compile: bool = False
    offload: bool = False
    hot_tokens: int | None = None
    prefetch: bool = False
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("budget", 1),
            ("sinks", 0),
            ("recent", 1),
            ("bits", 1),
            ("refine", 0),
            ("dense_layers", 0),
            ("max_query_length", 1),
            ("mlp_chunk", 0),
            ("seed", 0),
        ):
            _check_integer(name, getattr(self, name), least)
        for name in ("per_query_head", "compile", "offload", "prefetch"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.budget < self.sinks + self.recent:
            least = self.sinks + self.recent
            raise ConfigError(
                f"budget={self.budget} is below sinks + recent = {self.sinks} + {self.recent} = "
                f"{least}, which it includes: raise budget to at least {least}, or lower sinks "
                "or recent"
            )
        _check_choice("index", self.index, INDEXES)
        _check_choice("prefill", self.prefill, PREFILLS)
        _check_choice("prefill_scores", self.prefill_scores, PREFILL_SCORES)
        _check_share("prefill_mass", self.prefill_mass)
        allowed_bits = (1, 2) if self.index == "rotated" else (1,)
        if self.bits not in allowed_bits:
            raise ConfigError(
                f"bits={self.bits} is not available for index={self.index!r}: choose from "
                f"{', '.join(map(str, allowed_bits))}"
                + ("" if self.index == "rotated" else ', or index="rotated" for 2 bits')
            )
        if self.group_size is not None:
            _check_integer("group_size", self.group_size, 32)
            if self.group_size not in GROUP_SIZES:
                raise ConfigError(
                    f"group_size={self.group_size} does not divide a tile of 512 tokens into whole "
                    "bit planes: choose 32, 64, 128, 256 or 512"
                )
        if self.refine == 1:
            raise ConfigError(
                "refine=1 scores as many tokens again as it chooses, which changes nothing: choose "
                "0, or 2 and more"
            )
        is_code = isinstance(self.refine_bits, int) and not isinstance(self.refine_bits, bool)
        if self.refine_bits != "exact" and not (is_code and self.refine_bits in REFINE_BITS):
            raise ConfigError(
                f"refine_bits={self.refine_bits!r} is not available: choose 2, 3, 4 or 'exact'"
            )
        if self.refine and is_code and (self.index, self.bits) != ("rotated", 1):
            raise ConfigError(
                f"refine_bits={self.refine_bits} refines the one bit of index='rotated', and this "
                f"is index={self.index!r} with bits={self.bits}: choose that, or "
                "refine_bits='exact'"
            )
        if self.hot_tokens is not None:
            _check_integer("hot_tokens", self.hot_tokens, 1)
            if self.hot_tokens < self.budget:
                raise ConfigError(
                    f"hot_tokens={self.hot_tokens} is below budget={self.budget}, and all that a "
                    "step selects has to be there at once: raise it to the budget at least"
                )
        if self.offload and self.refines_by_keys:
            raise ConfigError(
                "refine_bits='exact' reads the keys of all candidates, which offload=True keeps on "
                "the host: choose refine_bits=2, 3 or 4, whose codes stay on the device"
            )
        if self.prefetch and not self.offload:
            raise ConfigError(
                "prefetch=True fetches K and V from the host, where offload=False keeps none: set "
                "offload=True too, or prefetch=False"
            )
        _check_choice("backend", self.backend, BACKENDS)
        if self.offload and self.backend == "flex":
            raise ConfigError(
                'backend="flex" reads K and V on the device, and offload=True (or an offloaded '
                'cache_implementation) keeps them on the host: use backend="auto", or do not '
                "offload"
            )

    def replace(self, **changes: Any) -> FierConfig:
        """A copy with some fields changed, checked like a new one."""
        return type(self).from_dict({**dataclasses.asdict(self), **changes})

    @property
    def index_group_size(self) -> int:
        """`group_size`, or the index's own default where it is None."""
        return self.group_size or {"rotated": 128, "fier": 32}[self.index]

    @property
    def hot_rows(self) -> int:
        """Rows of a hot set: `hot_tokens`, or four times the budget where it is None."""
        return self.hot_tokens or 4 * self.budget

    @property
    def code_bits(self) -> int:
        """`refine_bits` where the index has codes for it, else 0."""
        return self.refine_bits if self.refine and isinstance(self.refine_bits, int) else 0

    @property
    def refines_by_keys(self) -> bool:
        """Whether candidates are scored again by the keys themselves."""
        return self.refine > 0 and not self.code_bits

    def to_json(self) -> str:
        """The settings as a JSON object; `from_json` gives an equal config back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> FierConfig:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: the text is not a JSON object, or holds an unknown or bad field.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON object of settings: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"expected a JSON object of settings, got {type(fields).__name__}")
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FierConfig:
        """Build from a mapping; an unknown name is an error that names the nearest field."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ConfigError(f"unknown option {name!r}: {hint}")
        return cls(**fields)


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ConfigError(f"{name}={value} is too small: it must be at least {least}")
    if value > _MOST:
        raise ConfigError(f"{name}={value} is too large: operators take 64 bits, at most {_MOST}")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not 0 < value <= 1:
        raise ConfigError(f"{name}={value} is out of range: it must be above 0 and at most 1")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(f"unknown {name} {value!r}: choose from {listed}{hint}")
