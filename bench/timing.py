"""Timers that the benches share: graph replays with a cold L2, queued steps, turns, bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

FLUSH_NBYTES = 256 << 20  # five times the 50 MB L2 of an H100
CALLS = 4  # in a graph: what a launch of it costs is shared by them
WARM_UP = 3  # calls; torch asks for as many before a capture


def summary(samples: list[float], unit: str) -> dict[str, float]:
    """Median, 20th and 80th percentile as the columns of a row."""
    ordered = sorted(samples)
    return {
        unit: statistics.median(ordered),
        f"{unit}_p20": ordered[len(ordered) // 5],
        f"{unit}_p80": ordered[len(ordered) * 4 // 5],
    }


def synchronize(device: str) -> None:
    """Wait for the device, where there is anything to wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def replays(
    function: Callable[[], object],
    *,
    device: str,
    count: int,
    before: Callable[[], object] = lambda: None,
) -> list[float]:
    """Microseconds of the device's work in one call, the L2 cold.

    On a CUDA device a graph of `CALLS` calls is replayed, each behind a pass over more memory than
    the L2 holds, and a graph of the passes alone; the difference is the calls'. A pass only reads,
    so that it leaves the L2 as a model's weights do, with nothing to write back. On a CPU the
    function is simply called.

    Args:
        function: works on the same tensors in every call.
        device: where it works.
        count: samples to take.
        before: runs before each replay, outside the time, say to put a counter back.
    """
    if torch.device(device).type != "cuda":
        return _calls(function, count, before)
    memory = torch.zeros(FLUSH_NBYTES // 4, device=device)
    total = torch.zeros((), device=device)

    def flush() -> None:
        torch.sum(memory, 0, out=total)

    def calls() -> list[object]:
        outputs = []
        for _ in range(CALLS):
            flush()
            outputs.append(function())
        return outputs

    def flushes() -> None:
        for _ in range(CALLS):
            flush()

    graphs = [capture(calls, before), capture(flushes, before)]
    samples = []
    for number in range(count + WARM_UP):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        for place, (graph, _output) in enumerate(graphs):
            before()
            # One more, in whose 0.1 ms the host launches the graph.
            flush()
            events[2 * place].record()
            graph.replay()
            events[2 * place + 1].record()
        if number >= WARM_UP:
            samples.append(events)
    torch.cuda.synchronize()
    return [
        (start.elapsed_time(stop) - empty.elapsed_time(end)) * 1e3 / CALLS
        for start, stop, empty, end in samples
    ]


def capture(
    function: Callable[[], object], before: Callable[[], object] = lambda: None
) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of what a function launches, which ran before, and what it returned.

    Args:
        function: to capture.
        before: runs before each run of it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            before()
            function()
    torch.cuda.current_stream().wait_stream(stream)
    before()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


def _calls(function: Callable[[], object], count: int, before: Callable[[], object]) -> list[float]:
    samples = []
    for number in range(count + WARM_UP):
        before()
        start = time.perf_counter()
        function()
        if number >= WARM_UP:
            samples.append((time.perf_counter() - start) * 1e6)
    return samples


def queued(
    function: Callable[[], object], *, device: str, count: int, warm_up: int = WARM_UP
) -> list[float]:
    """Milliseconds of each call, called one after another without waiting for the device."""
    for _ in range(warm_up):
        function()
    if torch.device(device).type != "cuda":
        ticks = [time.perf_counter()]
        for _ in range(count):
            function()
            ticks.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in pairwise(ticks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def interleaved(
    functions: dict[str, Callable[[], object]], *, device: str, count: int
) -> dict[str, list[float]]:
    """Milliseconds of each call by the host's clock, the functions taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(count + WARM_UP):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def copy_bandwidth(device: str, nbytes: int = 1 << 30, count: int = 20) -> float:
    """Bytes a second, read and written ones together, of a copy within the device's memory."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    samples = queued(lambda: target.copy_(source), device=device, count=count)
    return 2 * nbytes / (statistics.median(samples) * 1e-3)
