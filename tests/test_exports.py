"""What `fierpatch` promises by name is there, described and findable."""

import importlib.metadata

import pytest

import fierpatch

CORE = {"FierCache", "FierConfig", "apply", "estimate", "remove", "verify"}
every_name = pytest.mark.parametrize("name", fierpatch.__all__)


def test_the_core_names_are_public() -> None:
    assert set(fierpatch.__all__) >= CORE


def test_no_name_is_listed_twice() -> None:
    assert len(set(fierpatch.__all__)) == len(fierpatch.__all__)


@every_name
def test_a_public_name_resolves(name: str) -> None:
    assert getattr(fierpatch, name) is not None


@every_name
def test_a_public_name_is_listed_by_dir(name: str) -> None:
    assert name in dir(fierpatch)


@pytest.mark.parametrize("name", sorted(set(fierpatch.__all__) - {"__version__"}))
def test_a_public_name_is_documented(name: str) -> None:
    """Its docstring is its own: not inherited, and not the signature a dataclass gets by itself."""
    docstring = getattr(fierpatch, name).__doc__
    assert docstring
    assert not docstring.startswith(f"{name}(")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fierpatch.no_such_name


def test_the_version_is_that_of_the_installed_package() -> None:
    assert fierpatch.__version__ == importlib.metadata.version("fierpatch")
