"""What a forward passes on is read from its source, or said to be unknown."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from torch import nn

from fierpatch.hf.source import UNKNOWN, passed


def callee(*arguments: Any, **options: Any) -> None:
    """Called by none of the modules below, whose source alone is read."""


class Straight(nn.Module):
    def forward(self, x: Any, pair: Any) -> Any:
        """With a docstring."""
        y = self.first(x)
        y = self.second(y).view(2)
        one, other = pair
        return callee(y, other, one, named=(one, y), **{})


class Conditional(nn.Module):
    def __init__(self, has_norm: bool) -> None:
        super().__init__()
        self.has_norm = has_norm
        self.size = None

    def forward(self, x: Any) -> Any:
        if self.has_norm and self.size is None:
            x = self.norm(x)
        if not self.has_norm:
            x = self.plain(x)
        return callee(x)


class Changing(nn.Module):
    def forward(self, x: Any, pair: Any) -> Any:
        y = self.first(x)
        z = self.second(x)
        if x is not None:
            y.clamp_(0)
        for _ in pair:
            pair = x
        return callee(y, z, pair)


class Silent(nn.Module):
    def forward(self, x: Any) -> Any:
        if x:
            callee(x)
        return x


def read(module: nn.Module, place: int, keyword: str | None = None) -> str:
    return ast.unparse(passed(module, "callee", place, keyword))


def test_names_are_replaced_by_what_was_assigned() -> None:
    assert read(Straight(), 0) == "self.second(self.first(x)).view(2)"
    assert read(Straight(), 1) == "pair[1]"
    assert read(Straight(), 5, "named") == "(pair[0], self.second(self.first(x)).view(2))"


@pytest.mark.parametrize(
    ("has_norm", "argument"), [(True, "self.norm(x)"), (False, "self.plain(x)")]
)
def test_conditions_on_the_module_are_decided_by_it(has_norm: bool, argument: str) -> None:
    assert read(Conditional(has_norm), 0) == argument


def test_what_cannot_be_followed_is_unknown() -> None:
    assert read(Changing(), 0) == UNKNOWN
    assert read(Changing(), 2) == UNKNOWN


def test_what_is_not_called_for_certain_is_an_error() -> None:
    with pytest.raises(LookupError, match="Silent does not call callee"):
        read(Silent(), 0)
    with pytest.raises(LookupError, match="Straight"):
        read(Straight(), 3)
