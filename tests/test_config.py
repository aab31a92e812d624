"""A config is checked once, frozen, and says which setting is wrong and what would be right."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fierpatch import FierConfig
from fierpatch.errors import ConfigError, FierError, NotYetSupportedError

FIELDS = tuple(field.name for field in dataclasses.fields(FierConfig))
INTEGERS = {  # and the least that each may be
    "budget": 1,
    "sinks": 0,
    "recent": 1,
    "bits": 1,
    "refine": 0,
    "dense_layers": 0,
    "max_query_length": 1,
    "mlp_chunk": 0,
    "seed": 0,
}
FLAGS = ("per_query_head", "compile", "offload", "prefetch")


@st.composite
def configs(draw: st.DrawFn) -> FierConfig:
    sinks, recent = draw(st.integers(0, 64)), draw(st.integers(1, 256))
    index = draw(st.sampled_from(("rotated", "fier")))
    bits = draw(st.sampled_from((1, 2))) if index == "rotated" else 1
    refine = draw(st.just(0) | st.integers(2, 100))
    has_codes = not refine or (index, bits) == ("rotated", 1)
    refine_bits = draw(st.sampled_from((2, 3, 4, "exact") if has_codes else ("exact",)))
    budget = sinks + recent + draw(st.integers(0, 10**6))
    backend = draw(st.sampled_from(("auto", "triton", "reference", "flex")))
    is_offloadable = backend != "flex" and not (refine and refine_bits == "exact")
    offload = draw(st.booleans()) and is_offloadable
    return FierConfig(
        budget=budget,
        sinks=sinks,
        recent=recent,
        index=index,
        bits=bits,
        refine=refine,
        refine_bits=refine_bits,
        group_size=draw(st.none() | st.sampled_from((32, 64, 128, 256, 512))),
        dense_layers=draw(st.integers(0, 100)),
        per_query_head=draw(st.booleans()),
        max_query_length=draw(st.integers(1, 10**6)),
        mlp_chunk=draw(st.integers(0, 10**6)),
        prefill=draw(st.sampled_from(("dense", "sparse"))),
        prefill_mass=draw(st.floats(0, 1, exclude_min=True)),
        prefill_scores=draw(st.sampled_from(("index", "keys"))),
        compile=draw(st.booleans()),
        offload=offload,
        hot_tokens=draw(st.none() | st.integers(budget, 3 * budget)),
        prefetch=offload and draw(st.booleans()),
        backend=backend,
        seed=draw(st.integers(0, 2**40)),
    )


@given(configs())
@example(FierConfig())
def test_a_config_survives_json(config: FierConfig) -> None:
    assert FierConfig.from_json(config.to_json()) == config


@given(configs())
def test_a_config_survives_a_dict(config: FierConfig) -> None:
    assert FierConfig.from_dict(dataclasses.asdict(config)) == config


@given(configs(), configs())
def test_replacing_every_field_gives_the_other_config(one: FierConfig, other: FierConfig) -> None:
    assert one.replace(**dataclasses.asdict(other)) == other
    assert one.replace() == one


@given(configs(), st.sampled_from(FIELDS))
def test_a_config_is_frozen(config: FierConfig, name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    assert hash(config) == hash(config.replace())


def test_settings_are_named() -> None:
    with pytest.raises(TypeError):
        FierConfig(512)


@given(name=st.sampled_from(sorted(INTEGERS)), below=st.integers(1, 10**9))
def test_an_integer_below_its_least_is_refused_by_name(name: str, below: int) -> None:
    least = INTEGERS[name]
    with pytest.raises(ConfigError, match=rf"^{name}={least - below} .*at least {least}$"):
        FierConfig(**{name: least - below})


not_integers = (
    st.booleans() | st.none() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)
)


@given(name=st.sampled_from(sorted({*INTEGERS, "group_size"})), value=not_integers)
def test_what_is_no_integer_is_refused_by_name(name: str, value: object) -> None:
    assume(name != "group_size" or value is not None)
    with pytest.raises(ConfigError, match=f"^{name} must be an integer"):
        FierConfig(**{name: value})


@given(name=st.sampled_from(FLAGS), value=st.integers() | st.none() | st.text() | st.floats())
def test_what_is_no_flag_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be True or False"):
        FierConfig(**{name: value})


@given(
    name=st.sampled_from(("index", "backend", "prefill", "prefill_scores")),
    value=st.text() | st.none() | st.integers() | st.lists(st.integers(), max_size=2),
)
def test_an_unknown_choice_is_refused_by_name(name: str, value: object) -> None:
    known = ("rotated", "fier", "auto", "reference", "triton", "flex")
    assume(value not in (*known, "dense", "sparse", "index", "keys"))
    with pytest.raises(ConfigError, match=f"^unknown {name} .*choose from"):
        FierConfig(**{name: value})


@given(st.floats().filter(lambda x: not 0 < x <= 1) | st.integers().filter(lambda x: x != 1))
def test_a_share_out_of_range_is_refused_by_name(value: float) -> None:
    with pytest.raises(
        ConfigError, match=r"^prefill_mass=.* out of range: .*above 0 and at most 1"
    ):
        FierConfig(prefill_mass=value)


@given(st.booleans() | st.none() | st.text() | st.lists(st.integers(), max_size=2))
def test_what_is_no_number_is_no_share(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^prefill_mass must be a number"):
        FierConfig(prefill_mass=value)


@given(sinks=st.integers(1, 50), recent=st.integers(1, 50), data=st.data())
def test_a_budget_must_hold_sinks_and_recents(sinks: int, recent: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, sinks + recent - 1))
    with pytest.raises(ConfigError, match=rf"budget={budget} .*at least {sinks + recent}"):
        FierConfig(budget=budget, sinks=sinks, recent=recent)


@given(group_size=st.integers(32, 2000))
def test_a_group_size_divides_a_tile_into_whole_planes(group_size: int) -> None:
    if group_size in (32, 64, 128, 256, 512):
        assert FierConfig(group_size=group_size).index_group_size == group_size
        return
    with pytest.raises(ConfigError, match=f"group_size={group_size} .*32, 64, 128, 256 or 512"):
        FierConfig(group_size=group_size)


@pytest.mark.parametrize("group_size", [-1, 0, 1, 31])
def test_a_group_is_at_least_a_plane(group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"group_size={group_size} .*at least 32"):
        FierConfig(group_size=group_size)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"index": "fier", "bits": 2}, ["bits=2", "'fier'", '"rotated"']),
        ({"bits": 3}, ["bits=3", "'rotated'", "1, 2"]),
        ({"refine": 1}, ["refine=1", "0, or 2"]),
        ({"refine_bits": 1}, ["refine_bits=1", "2, 3, 4"]),
        ({"refine_bits": 2.0}, ["refine_bits=2.0", "exact"]),
        ({"refine_bits": True}, ["refine_bits=True", "exact"]),
        ({"refine_bits": "all"}, ["refine_bits='all'", "exact"]),
        ({"refine": 4, "bits": 2}, ["refine_bits=4", "bits=2", "'exact'"]),
        ({"refine": 4, "index": "fier"}, ["refine_bits=4", "index='fier'", "'exact'"]),
        ({"prefetch": True}, ["prefetch=True", "offload=True"]),
        ({"index": "rotate"}, ["index", "did you mean 'rotated'?"]),
        ({"backend": "referense"}, ["backend", "did you mean 'reference'?"]),
        ({"backend": "flex", "offload": True}, ['backend="flex"', "offload=True", '"auto"']),
    ],
)
def test_the_message_names_the_setting_and_the_remedy(
    settings: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        FierConfig(**settings)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("buget", "budget"), ("groupsize", "group_size"), ("sink", "sinks"), ("recents", "recent")],
)
def test_an_unknown_option_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{name}': did you mean '{nearest}'?"):
        FierConfig.from_dict({name: 1})
    with pytest.raises(ConfigError, match=f"'{nearest}'"):
        FierConfig().replace(**{name: 1})


@given(name=st.text())
def test_an_option_like_no_other_lists_what_there_is(name: str) -> None:
    assume(name not in FIELDS)
    with pytest.raises(ConfigError, match=r"unknown option .*(did you mean|known: budget, sinks)"):
        FierConfig.from_json(json.dumps({name: 1}))


@pytest.mark.parametrize("text", ["", "{", "budget=3", "[1, 2]", "3", "null", '"budget"'])
def test_what_is_no_object_of_settings_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="JSON object of settings"):
        FierConfig.from_json(text)


def test_a_bad_value_in_json_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="budget must be an integer"):
        FierConfig.from_json('{"budget": "many"}')


@pytest.mark.parametrize(("index", "group_size"), [("rotated", 128), ("fier", 32)])
def test_the_group_size_is_the_index_s_own_where_none_is_set(index: str, group_size: int) -> None:
    assert FierConfig(index=index).index_group_size == group_size


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(NotYetSupportedError, FierError)
