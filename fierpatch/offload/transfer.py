"""Copies of a prompt's keys and values to the host and from it, beside the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

_MOST_WAITING = 1  # copies under way when the next one starts


class Transfer:
    """The copies of the layers of one cache, in order, on a stream of their own.

    What is copied stays on the device until it has been: of one layer while the next computes, so
    that the computation waits for the copies before they hold more than two layers of a prompt.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def send(self, source: Tensor, parts: Sequence[Tensor]) -> None:
        """Copy a tensor to the host.

        Whoever reads the parts on the device afterwards has to `join` first.

        Args:
            source: contiguous; must not change any more.
            parts: flat tensors of the host, for one stretch of it after the other; a copy each.
        """
        if source.device.type != "cuda":
            copy_to_parts(source, parts)
            return
        device = source.device
        stream = _copy_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copy_to_parts(source, parts)
            event = torch.cuda.Event()
            event.record(stream)
        self._waiting.append((event, source))
        self._join(_MOST_WAITING)

    def receive(self, parts: Sequence[Tensor], target: Tensor) -> Callable[[], None]:
        """Begin to copy from the host, behind all that was sent there or written by the device.

        Args:
            parts: flat tensors of the host, which must not change before the copies are waited for.
            target: contiguous, on the device, as large as all of them.

        Returns:
            What lets the computation wait for the copies.
        """
        if target.device.type != "cuda":
            _copy_from_parts(parts, target)
            return lambda: None
        device = target.device
        stream = _receiving_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        stream.wait_stream(_copy_stream(device))
        with torch.cuda.stream(stream):
            _copy_from_parts(parts, target)
            event = torch.cuda.Event()
            event.record(stream)
        # If nobody waits, the memory must not be used again before it is written.
        target.record_stream(stream)
        return lambda: event.wait(torch.cuda.current_stream(device))

    def join(self) -> None:
        """Let the computation wait for all copies to the host."""
        self._join(0)

    def _join(self, most: int) -> None:
        while len(self._waiting) > most:
            event, source = self._waiting[0]
            # Behind this the allocator may give the memory to whatever computes next.
            event.wait(torch.cuda.current_stream(source.device))
            self._waiting.popleft()


def copy_to_parts(source: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy a contiguous tensor, one stretch of it after the other, to flat ones as large."""
    for source_part, part in zip(_split(source, parts), parts, strict=True):
        part.copy_(source_part, non_blocking=True)


def _copy_from_parts(parts: Sequence[Tensor], target: Tensor) -> None:
    for part, target_part in zip(parts, _split(target, parts), strict=True):
        target_part.copy_(part, non_blocking=True)


def _split(whole: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Into stretches as large as the parts; an error if it is not contiguous, or not as large."""
    return whole.view(-1).split([part.numel() for part in parts])


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all caches: what a run that was broken off still copies comes before the next run's.

    Which may be to the same memory.
    """
    return torch.cuda.Stream(device)


@cache
def _receiving_stream(device: torch.device) -> torch.cuda.Stream:
    """Beside the other, as PCIe carries both ways at once."""
    return torch.cuda.Stream(device)
