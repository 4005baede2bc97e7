"""Gives torch devices when it is imported; see the package. For this process alone."""

from __future__ import annotations

import ctypes
import datetime
import importlib.util
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from simulated_cuda.building import ENVIRONMENT, LIBRARIES, TORCH

# Before torch asks for its hooks the first time.
for name in LIBRARIES:
    ctypes.CDLL(str(TORCH / "lib" / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
ctypes.CDLL(os.environ[ENVIRONMENT])

import torch  # noqa: E402
import torch.cuda.nccl  # noqa: E402
import torch.distributed as dist  # noqa: E402  device.cpp derives from its classes
from torch.distributed import distributed_c10d  # noqa: E402

_spec = importlib.util.spec_from_file_location("simulated_cuda_device", os.environ[ENVIRONMENT])
device = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(device)
device.delay_copies(int(os.environ.get("SIMULATED_CUDA_DELAY", "0")))


# --- devices --------------------------------------------------------------------------------------------------------


def _index(where: Any) -> int:
    if isinstance(where, int):
        return device.get_device() if where < 0 else where
    index = None if where is None else torch.device(where).index
    return device.get_device() if index is None else index


class _OnDevice:
    def __init__(self, where: Any) -> None:
        self.index = _index(where)

    def __enter__(self) -> None:
        self.before = device.get_device()
        device.set_device(self.index)

    def __exit__(self, *_: object) -> None:
        device.set_device(self.before)


def _initialize() -> None:
    torch.cuda._initialized = True


torch.cuda._is_compiled = torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = torch.cuda.init = _initialize
torch.cuda.device_count = torch._C._cuda_getDeviceCount = device.count
torch.cuda.current_device = device.get_device
torch.cuda.set_device = lambda where: device.set_device(_index(where))
torch.cuda.device = _OnDevice
torch.cuda.get_device_capability = lambda where=None: (7, 0)
torch.cuda.get_device_name = lambda where=None: "Simulated"
torch.cuda.get_device_properties = lambda where=None: SimpleNamespace(name="Simulated", major=7, minor=0)
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
torch._C._cuda_getCurrentRawStream = lambda index: 0

# --- streams --------------------------------------------------------------------------------------------------------


class _Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.plain = torch.Event("cuda", enable_timing=enable_timing)

    def record(self, stream: _Stream | None = None) -> None:
        self.plain.record((stream or _current_stream()).plain)

    def wait(self, stream: _Stream | None = None) -> None:
        (stream or _current_stream()).wait_event(self)

    def elapsed_time(self, other: _Event) -> float:
        return self.plain.elapsed_time(other.plain)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


class _Stream:
    def __init__(self, where: Any = None, priority: int = 0, *, plain: torch.Stream | None = None) -> None:
        self.plain = plain or torch.Stream(torch.device("cuda", _index(where)))

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def wait_event(self, event: _Event) -> None:
        self.plain.wait_event(event.plain)

    def wait_stream(self, other: _Stream) -> None:
        self.wait_event(other.record_event())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and self.plain == other.plain

    def __hash__(self) -> int:
        return hash(self.plain)


class _InStream(_OnDevice):
    def __init__(self, stream: _Stream | None) -> None:
        super().__init__(None if stream is None else stream.plain.device)
        self.stream = stream

    def __enter__(self) -> None:
        super().__enter__()
        self.stream_before = _current_stream()
        if self.stream is not None:
            torch.accelerator.set_stream(self.stream.plain)

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_stream(self.stream_before.plain)
        super().__exit__()


def _current_stream(where: Any = None) -> _Stream:
    return _Stream(plain=torch.accelerator.current_stream(torch.device("cuda", _index(where))))


def _default_stream(where: Any = None) -> _Stream:
    return _Stream(plain=torch.Stream(stream_id=0, device_index=_index(where), device_type=1))


torch.cuda.Stream = torch.cuda.streams.Stream = _Stream
torch.cuda.Event = torch.cuda.streams.Event = _Event
torch.cuda.stream = _InStream
torch.cuda.current_stream = _current_stream
torch.cuda.default_stream = _default_stream
torch.cuda.set_stream = lambda stream: torch.accelerator.set_stream(stream.plain)
torch.cuda.synchronize = lambda where=None: torch.accelerator.synchronize(torch.device("cuda", _index(where)))
torch.cuda._sleep = lambda cycles: device.sleep(cycles / 1e9)

# --- memory ---------------------------------------------------------------------------------------------------------


class _Runtime:
    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:
        device.pin(address, size)
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        return 0 if device.unpin(address) else 1


torch.cuda._cudart = _Runtime
torch.cuda.cudart = lambda: _Runtime
for module in (torch.cuda, torch.cuda.memory):
    module.memory_allocated = module.max_memory_allocated = lambda where=None: device.allocated()
    module.memory_reserved = module.max_memory_reserved = lambda where=None: device.allocated()
    module.memory_stats = lambda where=None: defaultdict(int)
    module.mem_get_info = lambda where=None: (1 << 33, 1 << 34)
    module.empty_cache = module.ipc_collect = module.reset_peak_memory_stats = lambda where=None: None


def _whole(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _on_device(of_host: Any, of_device: Any) -> Any:
    return lambda one, *rest: (of_device if one.device.type == "cuda" else of_host)(one, *rest)


def _deepcopy(storage: torch.UntypedStorage, memo: dict) -> torch.UntypedStorage:
    copies = memo.setdefault("torch", {})
    if storage._cdata not in copies:
        copies[storage._cdata] = storage.clone()
    return copies[storage._cdata]


def _resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    device.resize_storage(_whole(storage), size)
    return storage


_storage: Any = torch.UntypedStorage
_storage.clone = _on_device(_storage.clone, lambda storage: _whole(storage).clone().untyped_storage())
_storage.resize_ = _on_device(_storage.resize_, _resize)
_storage.__deepcopy__ = _on_device(_storage.__deepcopy__, _deepcopy)
torch.Tensor.record_stream = lambda one, stream: device.record_stream(one, stream.device_index, stream.stream_id)

# --- random numbers -------------------------------------------------------------------------------------------------


def _seed(seed: int) -> None:
    for index in range(device.count()):
        device.seed(seed % 2**63, index)


for module in (torch.cuda, torch.cuda.random):
    module.get_rng_state = lambda where=None: device.random_state(_index(where))
    module.set_rng_state = lambda state, where=None: device.set_random_state(state, _index(where))
    module.manual_seed = module.manual_seed_all = _seed
    module.get_rng_state_all = lambda: [device.random_state(index) for index in range(device.count())]

# --- ranks ----------------------------------------------------------------------------------------------------------


class _Options:
    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self._timeout = datetime.timedelta(minutes=2)
        self.global_ranks_in_group: list[int] = []
        self.group_name = ""


class _ProcessGroupNCCL(device.SimulatedNCCL):
    Options = _Options

    def __init__(self, store: Any, rank: int, size: int, options: _Options) -> None:
        self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("simulated", store), rank, size, options._timeout)
        super().__init__(self.gloo, rank, size)


_init_process_group = dist.init_process_group


def _without_device(*arguments: Any, device_id: Any = None, **named: Any) -> None:
    _init_process_group(*arguments, **named)  # groups of a bound device are made by splitting it


distributed_c10d.ProcessGroupNCCL = _ProcessGroupNCCL
distributed_c10d.is_nccl_available = dist.is_nccl_available = lambda: True
distributed_c10d.init_process_group = dist.init_process_group = _without_device
torch.cuda.nccl.version = lambda: (2, 27, 0)

torch.zeros(1).pin_memory()  # or nothing is ever found to be pinned
_initialize()
