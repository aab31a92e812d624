"""Where the keys and values of a layer live: on the device, or on the host with a hot set."""

from __future__ import annotations

from fierpatch.offload.device_store import DeviceStore
from fierpatch.offload.host_store import HostStore
from fierpatch.offload.memory import MemoryPool
from fierpatch.offload.store import Store
from fierpatch.offload.transfer import Transfer

__all__ = ["DeviceStore", "HostStore", "MemoryPool", "Store", "Transfer"]
