"""What no way of saving or loading can be faster than, measured in turns with them: a disk is not always equally fast."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nemologger.disk.direct_file import open_direct, write_pages
from nemologger.disk.pages import own_pages

_BLOCK = 16 << 20


def forget(directory: Path) -> None:
    """Drop what the page cache has of the files below ``directory``."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Limits:
    """Copying ``size`` bytes into memory touched before, writing them durably, and reading them into such memory.

    Attributes:
        seconds: Of every turn, by name.
    """

    def __init__(self, size: int) -> None:
        self.seconds: dict[str, list[float]] = {"memcpy": [], "durable write": [], "read": []}
        self._size = size // mmap.PAGESIZE * mmap.PAGESIZE

    def turn(self, directory: Path) -> None:
        """Measure each once, with a file in ``directory``."""
        source, target = (torch.ones(self._size, dtype=torch.uint8) for _ in range(2))
        self._time("memcpy", lambda: target.copy_(source))
        path = directory / "raw"
        with own_pages(self._size) as pages:
            view = memoryview(pages)
            noise = torch.frombuffer(view, dtype=torch.int64).random_()  # zeros may be nothing to a virtual disk
            del noise
            self._time("durable write", lambda: self._write(path, view))
            forget(directory)
            self._time("read", lambda: self._read(path, view))
            view.release()

    def medians(self) -> dict[str, float]:
        """By name."""
        return {name: statistics.median(seconds) for name, seconds in self.seconds.items()}

    def _time(self, name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        self.seconds[name].append(time.perf_counter() - start)

    def _write(self, path: Path, view: memoryview) -> None:
        descriptor = open_direct(path) or os.open(path, os.O_CREAT | os.O_WRONLY)
        write_pages(descriptor, view, self._size)
        os.close(descriptor)

    def _read(self, path: Path, view: memoryview) -> None:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda at: os.preadv(descriptor, [view[at : at + _BLOCK]], at), range(0, self._size, _BLOCK)))
        os.close(descriptor)
