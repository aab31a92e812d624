"""The kernels of a hot set do what its tensors do, and attention by way of it changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kernels.feeds import Feed, check_append, feeds
from kernels.residencies import (
    Steps,
    any_steps,
    check_an_empty_row_goes_first,
    check_behind_the_end,
    check_break_off,
    check_lengths_ahead,
    check_residency,
)
from kernels.tensors import few

CPU = torch.device("cpu")


@few(25)
@given(case=any_steps())
@example(Steps(1, 1, 3))
@example(Steps(130, 65, 200, lists_per_kv_head=3, candidates=70, drift=30))
@example(Steps(64, 64, 128, fill=1.0, drift=64, candidates=9))
@example(Steps(40, 20, 60, candidates=9, crops=(10,), more_room=512))
@example(Steps(9, 3, 12, num_steps=70, drift=1, crops=(None, None, None, 5)))
def test_a_hot_set_by_kernels_is_that_of_the_tensors(case: Steps) -> None:
    check_residency(case, CPU)


def test_an_empty_row_goes_before_the_oldest() -> None:
    check_an_empty_row_goes_first(CPU)


def test_an_attention_that_breaks_off_leaves_no_token_without_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What had a place but did not come would be taken for what was in that row."""
    check_break_off(CPU, monkeypatch)


def test_a_token_behind_the_end_has_no_row() -> None:
    check_behind_the_end(CPU)


@few(25)
@given(
    num_lists=st.integers(1, 40),
    width=st.sampled_from((1, 9, 1024)),
    extra=st.sampled_from((-1, 0, 1, 100)),
)
def test_ahead_is_as_far_as_the_last_step_says_it_pays(
    num_lists: int, width: int, extra: int
) -> None:
    check_lengths_ahead(num_lists, width, extra, CPU)


@few(15)
@given(feed=feeds(longest=300, longest_piece=4), data=st.data())
def test_paired_rows_are_stored_and_indexed_as_others(feed: Feed, data: st.DataObject) -> None:
    check_append(feed, CPU, is_paired=True)


@pytest.mark.parametrize("index", ["rotated", "fier"])
@pytest.mark.parametrize("prompt", [126, 511])
def test_a_group_that_closes_reads_paired_keys(index: str, prompt: int) -> None:
    from fierpatch.index import make_index

    key_index = make_index(index, head_dim=64, bits=1, group_size=64, seed=0, refine_bits=0)
    check_append(
        Feed(key_index, prompt, prompt, (1, 1, 1), batch_size=2, num_kv_heads=2), CPU,
        is_paired=True,
    )  # fmt: skip
