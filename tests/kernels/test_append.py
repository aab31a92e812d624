"""Kernels store tokens and build the index that the reference builds, to the bit."""

from __future__ import annotations

import torch
from hypothesis import example, given

from fierpatch.index import FierIndex, RotatedIndex
from kernels.feeds import Feed, check_append, feeds
from kernels.tensors import few
from strategies import channel_offsets, constants, one_infinity, one_nan, one_outlier, ties

CPU = torch.device("cpu")


@few(12)
@given(feed=feeds())
@example(feed=Feed(RotatedIndex(128), 509, 509, (1, 1, 8, 3), kind=channel_offsets))
@example(feed=Feed(RotatedIndex(64, bits=2, group_size=32), 0, 0, (8, 25, 1), kind=one_nan))
@example(feed=Feed(RotatedIndex(80, bits=2, group_size=512), 511, 300, (1, 2), kind=ties))
@example(feed=Feed(RotatedIndex(192, group_size=64), 60, 0, (3, 1, 70), 2, 2, kind=one_outlier))
@example(feed=Feed(RotatedIndex(256, bits=2), 126, 126, (1, 1, 1), kind=one_infinity))
@example(feed=Feed(RotatedIndex(64, group_size=32), 100, 31, (450,), layout="transposed"))
@example(feed=Feed(FierIndex(64), 510, 510, (1, 1, 8), 2, 1, dtype=torch.float16, kind=one_nan))
@example(feed=Feed(FierIndex(96, group_size=512), 511, 40, (1, 5), kind=constants))
@example(feed=Feed(RotatedIndex(64, bits=2, group_size=32), 0, 0, (1,) * 34, 1, 2))
@example(feed=Feed(RotatedIndex(80, group_size=64), 508, 508, (1,) * 6, 2, 2, kind=one_nan))
@example(feed=Feed(RotatedIndex(64, bits=2), 127, 127, (1, 1, 2, 1), layout="offset"))
@example(feed=Feed(RotatedIndex(96), 40, 20, (1, 1), kind=channel_offsets, layout="strided"))
@example(feed=Feed(RotatedIndex(64, group_size=32), 70, 70, (1, 1, 1), kind=one_infinity, room=0))
@example(feed=Feed(RotatedIndex(128, refine_bits=4), 509, 400, (1, 1, 8, 3)))
@example(feed=Feed(RotatedIndex(80, group_size=32, refine_bits=2), 30, 3, (1,) * 4, kind=constants))
@example(feed=Feed(RotatedIndex(64, refine_bits=3), 5, 5, (1, 1, 130), 2, 2, kind=one_outlier))
def test_the_state_is_that_of_the_reference(feed: Feed) -> None:
    check_append(feed, CPU)


@few(5)
@given(feed=feeds(longest=200))
@example(feed=Feed(RotatedIndex(64), 510, 510, (1, 8, 4), 1, 2, room=-8))
@example(feed=Feed(FierIndex(64), 512, 512, (2, 1), 2, 2, room=-3, layout="offset"))
@example(feed=Feed(RotatedIndex(64, bits=2), 70, 70, (1, 1, 1, 1), 1, 2, room=-2))
def test_tokens_past_the_capacity_are_counted_but_not_written(feed: Feed) -> None:
    short = Feed(**{**vars(feed), "room": -min(sum(feed.pieces), 5)})
    check_append(short, CPU)


@few(1)
@given(feed=feeds(longest=10, heads=1))
@example(feed=Feed(FierIndex(64), 0, 0, (1,), batch_size=2, num_kv_heads=3, layout="strided"))
def test_a_piece_of_many_tiles_is_indexed_at_once(feed: Feed) -> None:
    check_append(Feed(**{**vars(feed), "pieces": (*feed.pieces, 520)}), CPU)
