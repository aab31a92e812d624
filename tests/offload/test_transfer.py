"""What is sent to the host stays on the device for as long as its copy, and for no longer."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fierpatch.offload import Transfer, transfer

NUM_LAYERS = 6


class Source:
    """Stands for a tensor of the device."""

    device = torch.device("cuda", 0)


class Streams:
    """In place of CUDA's: a log of what the streams were asked for, and of the sources alive."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, int]] = []
        self.alive: dict[int, weakref.ref[Source]] = {}
        streams = self

        class Event:
            def __init__(self) -> None:
                self.number = len(streams.alive) - 1

            def record(self, stream: Any) -> None:
                streams.log.append(("copied", self.number))

            def wait(self, stream: Any) -> None:
                assert stream == "computation"
                assert self.number in streams.held, "its memory was given away before"
                streams.log.append(("waited", self.number))

        side = SimpleNamespace(wait_stream=lambda stream: None)
        patch.setattr(transfer, "_copy_stream", lambda device: side)
        patch.setattr(transfer, "copy_to_parts", lambda source, parts: None)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device: "computation")
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def new_source(self) -> Any:
        source = Source()
        self.alive[len(self.alive)] = weakref.ref(source)
        return source

    @property
    def held(self) -> list[int]:
        return [number for number, source in self.alive.items() if source() is not None]


def test_the_computation_waits_for_all_copies_but_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that of a prompt two layers are held while one is sent, and one while the next computes.

    Not for the newest too, or nothing would be copied beside the computation.
    """
    streams = Streams(monkeypatch)
    sender = Transfer()
    for number in range(NUM_LAYERS):
        source = streams.new_source()
        assert len(streams.held) <= 2
        sender.send(source, [])
        del source
        assert streams.held == [number]
        waited = [("waited", number - 1)] if number else []
        assert streams.log == [("copied", number), *waited]
        streams.log.clear()
    sender.join()
    assert streams.held == []
    assert streams.log == [("waited", NUM_LAYERS - 1)]
