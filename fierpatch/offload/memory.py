"""Memory of the host that grows in place and that a CUDA device reads and writes by itself."""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fierpatch.errors import HostMemoryError

_MOST_AT_ONCE = 32 << 30  # bytes in one registration; CUDA refuses very large ones
# Python names it from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_PORTABLE = 1  # cudaHostRegisterPortable: for the contexts of all devices
_PAGE = 2 << 20  # bytes of a huge page, in which memory is handed out faster
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class MemoryPool:
    """Host memory that one cache has done with, kept for the next.

    To pin memory takes several times as long as to copy a prompt to it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may give back while this thread takes
        self._idle: list[HostMemory] = []
        self._is_open = True

    def take(self, nbytes: int, reserved: int, device: torch.device) -> HostMemory:
        """Memory of which the first `nbytes` can be used, whatever they hold.

        Raises:
            HostMemoryError: see `HostMemory`.
        """
        reserved = _round_up(1 << (max(reserved, 1) - 1).bit_length())
        with self._lock:
            fitting = [x for x in self._idle if (x.reserved, x.device) == (reserved, device)]
            if fitting:
                memory = max(fitting, key=lambda one: one.nbytes)
                self._idle.remove(memory)
            else:
                # Another shape than before, which will hardly come back.
                self._idle.clear()
                memory = HostMemory(reserved, device)
        memory.grow(nbytes)
        return memory

    def check(self, nbytes: int) -> None:
        """Check that so many bytes can be had, what is idle included.

        Raises:
            HostMemoryError: they cannot.
        """
        with self._lock:
            idle = sum(memory.nbytes for memory in self._idle)
        _check_free(nbytes - idle)

    def give_back(self, memory: HostMemory) -> None:
        """Keep it for the next cache, if there may be one."""
        with self._lock:
            if self._is_open:
                self._idle.append(memory)

    def open(self) -> None:
        """Keep what is given back from now on."""
        self._is_open = True

    def close(self) -> None:
        """Free what is idle, and from now on what is given back."""
        with self._lock:
            self._is_open = False
            self._idle.clear()


class HostMemory:
    """Zeros in one range of addresses, of which a part can be used; the part grows.

    For a CUDA device that part is pinned: registered with the driver, so that kernels and copy
    engines reach it at the same addresses. On a CPU it is ordinary memory. It is freed when the
    last tensor of it is gone.

    It is pinned in pieces, one or more whenever it grows. Kernels do not see where these end, but
    the driver refuses to copy over the end of one, and PyTorch has it copy what is contiguous, from
    a device to itself too: see `parts`. On a CPU there are the same pieces, so that one way of
    copying serves both.

    Args:
        reserved: bytes of addresses, which cost nothing until they are used.
        device: the device that works on it.

    Raises:
        HostMemoryError: the system does not give so many addresses, or has no such memory.
    """

    def __init__(self, reserved: int, device: torch.device) -> None:
        self.device = device
        self.reserved = _round_up(max(reserved, 1))
        self.nbytes = 0
        if not hasattr(mmap, "MAP_ANONYMOUS"):
            raise HostMemoryError(
                f"{sys.platform} has no memory that grows in place: leave offload=False"
            )
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        try:
            self._map = mmap.mmap(-1, self.reserved, flags=flags)
        except OSError as error:
            raise HostMemoryError(
                f"the system refuses {self.reserved} bytes of addresses for keys and values on the "
                f"host ({error}): lower the model's max_position_embeddings, raise the limit on "
                "virtual memory (ulimit -v), or leave offload=False"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # without huge pages there are small ones
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._ends: list[int] = []  # of the pieces, in bytes
        self._pinned: list[int] = []
        weakref.finalize(self, _unpin, self._pinned, device).atexit = False

    def grow(self, nbytes: int) -> None:
        """Make the first `nbytes` usable.

        Raises:
            HostMemoryError: there is not so much free memory, or it cannot be pinned; nothing has
                changed.
        """
        wanted = _round_up(nbytes)
        if wanted > self.reserved:
            raise HostMemoryError(
                f"{nbytes} bytes of keys and values are more than the {self.reserved} that were "
                "reserved: start with a new cache of a larger max_cache_len"
            )
        if wanted <= self.nbytes:
            return
        _check_free(wanted - self.nbytes)
        ends = [*range(self.nbytes + _MOST_AT_ONCE, wanted, _MOST_AT_ONCE), wanted]
        if self.device.type == "cuda":
            # Handed out by the system to all threads first, it is pinned seven times faster.
            self._bytes[self.nbytes : wanted].zero_()
            self._pin([self.nbytes, *ends])
        self._ends += ends
        self.nbytes = wanted

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut a range of usable bytes where pieces end: ``start, stop`` of each part, in order."""
        for end in self._ends:
            last = min(end, stop)
            if start < last:
                yield start, last
                start = last

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The first bytes as a tensor on the CPU."""
        return self._bytes[: _size(shape, dtype)].view(dtype).view(shape)

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The same as a tensor of the device, whose kernels then read and write the host."""
        if self.device.type != "cuda":
            return self.host(shape, dtype)
        found = torch.as_tensor(_CudaBytes(self, _size(shape, dtype)), device=self.device)
        assert found.data_ptr() == self._bytes.data_ptr(), "a copy, not the memory itself"
        return found.view(dtype).view(shape)

    def _pin(self, bounds: list[int]) -> None:
        done: list[int] = []
        with torch.cuda.device(self.device):
            for start, stop in pairwise(bounds):
                address, size = self._bytes.data_ptr() + start, stop - start
                status = int(_cudart().cudaHostRegister(address, size, _PORTABLE))
                if status:
                    _unpin(done, self.device)
                    with suppress(RuntimeError, AssertionError):
                        # Else the next launch would take this error for its own.
                        torch.zeros(1, device=self.device)
                    raise HostMemoryError(
                        f"CUDA does not pin {size} bytes of host memory (cudaError {status}): "
                        "raise the limit on locked memory (ulimit -l), free memory, or leave "
                        "offload=False"
                    )
                done.append(address)
        self._pinned += done


class _CudaBytes:
    """Pinned memory as PyTorch takes memory of a CUDA device that it does not own."""

    def __init__(self, memory: HostMemory, nbytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory._bytes.data_ptr(), False),
            "version": 3,
        }


def available() -> int | None:
    """Bytes of memory that this process may still take, by the system and its control group."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    for limit_path, usage_path in _CGROUPS:
        try:
            limit, usage = Path(limit_path).read_text(), Path(usage_path).read_text()
            found.append(int(limit) - int(usage) + _page_cache(Path(usage_path).parent))
        except (OSError, ValueError):
            continue  # no such control group, or one without a limit
    return max(min(found), 0) if found else None


def _check_free(nbytes: int) -> None:
    free = available()
    if free is not None and nbytes > free:
        raise HostMemoryError(
            f"keys and values need {nbytes} more bytes of host memory and {free} are free: shorten "
            "the context, lower the batch size, or leave offload=False"
        )


def _page_cache(group: Path) -> int:
    """Bytes of files in memory that the system would give up first."""
    for line in (group / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _cudart() -> Any:
    return torch.cuda.cudart()


def _unpin(addresses: list[int], device: torch.device) -> None:
    """Nothing that the device has been asked for may still read or write there."""
    if not addresses:
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        for address in addresses:
            _cudart().cudaHostUnregister(address)
    addresses.clear()
