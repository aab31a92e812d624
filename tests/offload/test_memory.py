"""Memory of the host grows in place, is pinned in pieces and unpinned in the end, and is reused."""

from __future__ import annotations

import contextlib
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fierpatch.errors import HostMemoryError
from fierpatch.offload import MemoryPool, memory
from fierpatch.offload.memory import HostMemory, available

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
MIB = 1 << 20
PAGE = 2 * MIB


def bytes_of(held: HostMemory) -> torch.Tensor:
    return held.host((held.nbytes,), torch.uint8)


class TestHostMemory:
    @settings(max_examples=20)
    @given(sizes=st.lists(st.integers(0, 12 * MIB), min_size=1, max_size=5))
    def test_it_grows_in_place_and_keeps_what_it_holds(self, sizes: list[int]) -> None:
        """What is new in it is zero, also where it was asked for less than before."""
        held = HostMemory(12 * MIB, CPU)
        address, largest = None, 0
        for number, size in enumerate(sizes, start=1):
            before = bytes_of(held).clone()
            held.grow(size)
            largest = max(largest, size)
            assert largest <= held.nbytes < largest + PAGE
            now = bytes_of(held)
            assert torch.equal(now[: len(before)], before)
            assert not now[len(before) :].any()
            if len(now):
                address = address or now.data_ptr()
                assert now.data_ptr() == address
            now[len(before) :] = number

    def test_it_is_seen_as_any_tensor(self) -> None:
        held = HostMemory(PAGE, CPU)
        held.grow(100)
        rows = held.host((3, 4, 2), torch.float32)
        rows.copy_(torch.arange(24.0).view(3, 4, 2))
        same = held.on_device((24,), torch.float32)
        assert torch.equal(same, torch.arange(24.0))
        assert same.data_ptr() == rows.data_ptr() == bytes_of(held).data_ptr()

    def test_more_than_was_reserved_is_refused(self) -> None:
        held = HostMemory(3 * PAGE, CPU)
        held.grow(3 * PAGE)
        with pytest.raises(HostMemoryError, match=rf"{3 * PAGE + 1} bytes .* {3 * PAGE} .*reserv"):
            held.grow(3 * PAGE + 1)
        assert held.nbytes == 3 * PAGE

    def test_more_addresses_than_there_are_are_refused(self) -> None:
        with pytest.raises(HostMemoryError, match=rf"{1 << 62} bytes of addresses"):
            HostMemory(1 << 62, CPU)

    def test_a_system_without_such_memory_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(memory.mmap, "MAP_ANONYMOUS")
        with pytest.raises(HostMemoryError, match=rf"{sys.platform} .*offload=False"):
            HostMemory(PAGE, CPU)

    def test_more_than_is_free_is_refused_and_nothing_changes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only what is missing has to be free."""
        held = HostMemory(20 * PAGE, CPU)
        monkeypatch.setattr(memory, "available", lambda: 4 * PAGE)
        held.grow(3 * PAGE)
        bytes_of(held).fill_(7)
        with pytest.raises(HostMemoryError, match=rf"{5 * PAGE} more bytes .* {4 * PAGE} are free"):
            held.grow(8 * PAGE)
        assert held.nbytes == 3 * PAGE
        assert (bytes_of(held) == 7).all()
        held.grow(7 * PAGE)
        monkeypatch.setattr(memory, "available", lambda: None)  # where nobody knows
        held.grow(20 * PAGE)
        assert (bytes_of(held)[: 3 * PAGE] == 7).all()

    @pytest.mark.usefixtures("no_collector")
    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
    def test_its_addresses_go_with_the_last_tensor_of_it(self) -> None:
        """Of which it has many from the start, and touches none of them."""

        def pages() -> list[int]:
            return [int(field) for field in Path("/proc/self/statm").read_text().split()[:2]]

        before = pages()
        reserved = 64 << 30
        num_pages = reserved // 4096
        held = HostMemory(reserved, CPU)
        held.grow(reserved // 64)
        rows = held.host((5,), torch.int64)
        mapped, resident = pages()
        assert mapped - before[0] > num_pages // 2
        assert resident - before[1] < num_pages // 1000
        del held
        rows.fill_(3)
        assert pages()[0] - before[0] > num_pages // 2
        del rows
        assert pages()[0] - before[0] < num_pages // 2


class Driver:
    """Stands in for the CUDA runtime, and records what it is asked."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}  # sizes by address
        self.calls: list[str] = []
        self.devices: list[torch.device] = []
        self.num_left = -1  # registrations before one fails

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1, "for the contexts of all devices"
        self.calls.append("register")
        if self.num_left == 0:
            return 2  # cudaErrorMemoryAllocation
        self.num_left -= 1
        assert address not in self.pinned
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unregister")
        del self.pinned[address]
        return 0

    def device(self, device: torch.device) -> Any:
        self.devices.append(device)
        return contextlib.nullcontext()

    def ranges(self, held: HostMemory) -> list[tuple[int, int]]:
        start = held.host((1,), torch.uint8).data_ptr()
        return sorted((address - start, size) for address, size in self.pinned.items())


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Of a machine that pins four MiB at a time."""
    driver = Driver()
    monkeypatch.setattr(memory, "_cudart", lambda: driver)
    monkeypatch.setattr(memory, "_MOST_AT_ONCE", 4 * MIB)
    monkeypatch.setattr(torch.cuda, "device", driver.device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: driver.calls.append("synchronize"))
    return driver


@pytest.mark.usefixtures("no_collector")
class TestPinning:
    def test_what_can_be_used_is_pinned_piece_by_piece(self, driver: Driver) -> None:
        held = HostMemory(64 * MIB, CUDA)
        assert driver.pinned == {}
        held.grow(10 * MIB)
        pieces = [(0, 4 * MIB), (4 * MIB, 4 * MIB), (8 * MIB, 2 * MIB)]
        assert driver.ranges(held) == pieces
        held.grow(5 * MIB)
        assert driver.ranges(held) == pieces
        held.grow(16 * MIB)
        pieces += [(10 * MIB, 4 * MIB), (14 * MIB, 2 * MIB)]
        assert driver.ranges(held) == pieces
        parts = held.parts(0, held.nbytes)
        assert [(start, stop - start) for start, stop in parts] == pieces
        assert set(driver.devices) == {CUDA}

    def test_all_of_it_is_unpinned_when_nothing_uses_it_any_more(self, driver: Driver) -> None:
        held = HostMemory(64 * MIB, CUDA)
        held.grow(6 * MIB)
        held.grow(8 * MIB)
        del driver.calls[:]
        del held
        assert driver.pinned == {}
        assert driver.calls == ["synchronize", *["unregister"] * 3]
        assert set(driver.devices) == {CUDA}

    def test_memory_that_was_never_used_is_not_waited_for(self, driver: Driver) -> None:
        held = HostMemory(64 * MIB, CUDA)
        del held
        assert driver.calls == []

    def test_what_is_not_pinned_leaves_all_as_it_was(self, driver: Driver) -> None:
        held = HostMemory(64 * MIB, CUDA)
        held.grow(6 * MIB)
        bytes_of(held).fill_(7)
        before = driver.ranges(held)
        driver.num_left = 2
        with pytest.raises(HostMemoryError, match=rf"{2 * MIB} bytes .*cudaError 2.*ulimit -l"):
            held.grow(16 * MIB)
        assert driver.ranges(held) == before
        assert held.nbytes == 6 * MIB
        assert [*held.parts(0, 16 * MIB)] == [(0, 4 * MIB), (4 * MIB, 6 * MIB)]
        driver.num_left = -1
        held.grow(16 * MIB)
        assert sum(driver.pinned.values()) == 16 * MIB
        assert (bytes_of(held)[: 6 * MIB] == 7).all()
        del held
        assert driver.pinned == {}

    def test_what_is_not_free_is_not_pinned(
        self, driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = HostMemory(64 * MIB, CUDA)
        monkeypatch.setattr(memory, "available", lambda: 5 * MIB)
        with pytest.raises(HostMemoryError, match="are free"):
            held.grow(6 * MIB)
        assert driver.calls == []


GROUPS = {
    "/sys/fs/cgroup/memory.max": "/sys/fs/cgroup/memory.current",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "/sys/fs/cgroup/memory/memory.usage_in_bytes",
}
MEMINFO = (
    "MemTotal:       2000 kB\nMemFree:         10 kB\nMemAvailable:    1000 kB\nBuffers: 5 kB\n"
)
FREE = 1000 * 1024


class TestAvailable:
    """By the files of a system beside the real one."""

    @pytest.fixture(autouse=True)
    def _system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = tmp_path
        monkeypatch.setattr(memory, "Path", self.path)

    def path(self, name: str) -> Path:
        return self.root / str(name).lstrip("/")

    def write(self, name: str, text: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text)

    def write_group(self, limit_name: str, limit: str, usage: int, stat: str) -> None:
        self.write(limit_name, f"{limit}\n")
        self.write(GROUPS[limit_name], f"{usage}\n")
        self.write(str(Path(limit_name).parent / "memory.stat"), stat)

    def test_nobody_knows_where_the_system_does_not_say(self) -> None:
        assert available() is None

    def test_the_system_says_how_much_is_available(self) -> None:
        self.write("/proc/meminfo", MEMINFO)
        assert available() == FREE

    @pytest.mark.parametrize("name", GROUPS)
    def test_a_control_group_leaves_what_is_below_its_limit(self, name: str) -> None:
        """Files that it keeps in memory but has not used lately would make room."""
        self.write("/proc/meminfo", MEMINFO)
        stat = "anon 9000\nactive_file 500\ninactive_file 300\nsock 4\n"
        self.write_group(name, "10000", 9500, stat)
        assert available() == 10_000 - 9_500 + 300
        self.write_group(name, "10000", 9500, "anon 9000\n")
        assert available() == 10_000 - 9_500
        self.write_group(name, str(1 << 62), 9500, stat)
        assert available() == FREE
        self.write_group(name, "10000", 12_000, stat)
        assert available() == 0

    def test_a_control_group_may_have_no_limit(self) -> None:
        self.write("/proc/meminfo", MEMINFO)
        self.write_group("/sys/fs/cgroup/memory.max", "max", 9500, "inactive_file 300\n")
        assert available() == FREE

    def test_a_control_group_may_not_say_what_it_uses(self) -> None:
        self.write("/proc/meminfo", MEMINFO)
        self.write("/sys/fs/cgroup/memory.max", "10000\n")
        assert available() == FREE

    def test_the_tightest_limit_counts(self) -> None:
        self.write("/proc/meminfo", MEMINFO)
        for name, limit in zip(GROUPS, ("7000", "5000"), strict=True):
            self.write_group(name, limit, 1000, "")
        assert available() == 4000


@pytest.mark.usefixtures("no_collector")
class TestPool:
    def test_it_gives_the_same_memory_again(self) -> None:
        pool = MemoryPool()
        first = pool.take(100, 5 * PAGE, CPU)
        address = bytes_of(first).data_ptr()
        first.grow(3 * PAGE)
        bytes_of(first).fill_(7)
        pool.give_back(first)
        del first
        again = pool.take(4 * PAGE, 5 * PAGE, CPU)
        assert bytes_of(again).data_ptr() == address
        assert again.nbytes == 4 * PAGE
        assert (bytes_of(again)[: 3 * PAGE] == 7).all()

    def test_nobody_shares_what_it_gave(self) -> None:
        pool = MemoryPool()
        pool.give_back(pool.take(100, PAGE, CPU))
        held = [pool.take(100, PAGE, CPU) for _ in range(3)]
        assert len({bytes_of(one).data_ptr() for one in held}) == 3

    def test_what_is_pinned_already_goes_first(self) -> None:
        """The largest idle one, which has to grow the least."""
        pool = MemoryPool()
        held = [pool.take(size * PAGE, 8 * PAGE, CPU) for size in (1, 5, 3)]
        for one in held:
            pool.give_back(one)
        assert pool.take(2 * PAGE, 8 * PAGE, CPU) is held[1]

    @pytest.mark.parametrize("change", ["size", "device"])
    def test_idle_memory_of_another_kind_is_freed(self, change: str, driver: Driver) -> None:
        pool = MemoryPool()
        held = [pool.take(PAGE, 4 * PAGE, CUDA) for _ in range(2)]
        watched = [weakref.ref(one) for one in held]
        for one in held:
            pool.give_back(one)
        del held, one
        assert sum(driver.pinned.values()) == 2 * PAGE
        if change == "size":
            pool.take(PAGE, 5 * PAGE, CUDA)
        else:
            pool.take(PAGE, 4 * PAGE, CPU)
        assert [one() for one in watched] == [None, None]
        assert driver.pinned == {}

    def test_a_closed_one_keeps_nothing(self) -> None:
        pool = MemoryPool()
        idle, used = (pool.take(PAGE, PAGE, CPU) for _ in range(2))
        watched = weakref.ref(idle), weakref.ref(used)
        pool.give_back(idle)
        del idle
        pool.close()
        assert watched[0]() is None
        pool.give_back(used)
        del used
        assert watched[1]() is None
        pool.open()
        later = pool.take(PAGE, PAGE, CPU)
        pool.give_back(later)
        assert pool.take(PAGE, PAGE, CPU) is later

    def test_a_check_beforehand_counts_what_is_idle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = MemoryPool()
        held = [pool.take(2 * PAGE, 8 * PAGE, CPU) for _ in range(3)]
        for one in held[:2]:
            pool.give_back(one)
        monkeypatch.setattr(memory, "available", lambda: PAGE)
        pool.check(5 * PAGE)
        with pytest.raises(HostMemoryError, match=rf"{PAGE + 1} more bytes .* {PAGE} are free"):
            pool.check(5 * PAGE + 1)
