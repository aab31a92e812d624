"""Where the keys and values of a layer live: on the device, or on the host with a hot set."""

from __future__ import annotations

from fierpatch.offload.memory import MemoryPool
from fierpatch.offload.stores import DeviceStore, HostStore, Store
from fierpatch.offload.transfer import Transfer

__all__ = ["DeviceStore", "HostStore", "MemoryPool", "Store", "Transfer"]
