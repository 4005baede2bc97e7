"""How long a rank works on a batch itself, without what it waits for the others."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

_KEPT = 4096  # batches of one report, at most: the newest


@dataclass(frozen=True)
class OwnTime:
    """What a batch takes, the median over several.

    Attributes:
        data: Seconds until its data was there.
        compute: Seconds from then until its end, without waits for other ranks.
        batches: How many were measured.
    """

    data: float
    compute: float
    batches: int

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.data + self.compute


class Stopwatch:
    """Measures batch after batch. Call the methods in the order in which things happen.

    In training that is synchronous each batch takes all ranks equally long: the fast ones wait for the slow one. So the
    waits are told to this, and taken off. On a GPU moments are CUDA events, which cost no synchronisation; they are read
    one or two batches later.

    Args:
        device: What computes.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> watch.batch_began(); watch.wait_began(); watch.wait_ended(); watch.batch_ended()
        >>> watch.take().batches
        1
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._done: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._pending: deque[tuple[float, Any, list[tuple[Any, Any]], Any]] = deque()
        self._fetch: float | None = None
        self._data = 0.0
        self._start: Any = None
        self._waits: list[tuple[Any, Any]] = []
        self._wait: Any = None

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1e3 if self._on_gpu else end - start)

    def fetch_began(self) -> None:
        """The data of the next batch is asked for."""
        self._fetch = time.perf_counter()

    def fetch_ended(self) -> None:
        """It is there: the batch begins."""
        self._data = 0.0 if self._fetch is None else time.perf_counter() - self._fetch
        self._fetch = None
        self._begin()

    def batch_began(self) -> None:
        """The batch begins, if :meth:`fetch_ended` has not said so."""
        if self._start is None:
            self._data = 0.0
            self._begin()

    def _begin(self) -> None:
        self._waits = []
        self._wait = None
        self._start = self._mark()

    def wait_began(self) -> None:
        """From here on this rank may be waiting for others."""
        if self._start is not None:
            self._wait = self._mark()

    def wait_ended(self) -> None:
        """It is on its own again."""
        if self._wait is not None:
            self._waits.append((self._wait, self._mark()))
            self._wait = None

    def batch_ended(self) -> None:
        """The batch is done, optimizer step included."""
        if self._start is None:
            return
        self._pending.append((self._data, self._start, self._waits, self._mark()))
        self._start = None
        while self._pending and (not self._on_gpu or self._pending[0][3].query()):
            self._settle()

    def _settle(self) -> None:
        data, start, waits, end = self._pending.popleft()
        waited = sum(self._between(*wait) for wait in waits)
        self._done.append((data, max(self._between(start, end) - waited, 0.0)))

    def take(self) -> OwnTime:
        """The medians of what was measured since the last call."""
        done = list(self._done)
        self._done.clear()
        if not done:
            return OwnTime(0.0, 0.0, 0)
        return OwnTime(statistics.median(d for d, _ in done), statistics.median(c for _, c in done), len(done))
