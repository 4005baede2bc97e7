"""How long steps take: a stop watch for each kind of step."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import torch

from nemologger.condition import holds
from nemologger.errors import ConfigurationError

_REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "sum": sum,
    "min": min,
    "max": max,
    "none": lambda values: values[-1],
}


class StepTimer:
    """The durations of one kind of step, reduced over the last few of them.

    Args:
        buffer_size: How many of the last steps count; 1 or less is the last one.
        reduction: ``"mean"``, ``"sum"``, ``"min"``, ``"max"`` of them, or ``"none"`` for the last one.
        sync_cuda: Wait for the GPU at both ends. Without it, what the GPU has not finished counts for a later step.

    Raises:
        ConfigurationError: If there is no such reduction.

    Example:
        >>> timer = StepTimer(buffer_size=2, reduction="max")
        >>> for seconds in (3.0, 1.0, 2.0):
        ...     timer.add(seconds)
        >>> timer.value
        2.0
    """

    def __init__(self, buffer_size: int = 1, reduction: str = "mean", sync_cuda: bool = False) -> None:
        if reduction not in _REDUCTIONS:
            raise ConfigurationError(f"reduction={reduction!r}: expected one of {', '.join(map(repr, _REDUCTIONS))}")
        if not holds(lambda: [index(buffer_size)]):
            raise ConfigurationError(f"buffer_size={buffer_size!r}: expected a number of steps")
        self.buffer_size = max(1, buffer_size)
        self._durations: deque[float] = deque(maxlen=self.buffer_size)
        self._reduce = _REDUCTIONS[reduction]
        self._now = _now_on_the_gpu_too if sync_cuda else time.perf_counter
        self._start: float | None = None

    @classmethod
    def made_of(cls, owner: str, timer_kwargs: Mapping[str, Any] | None) -> StepTimer:
        """One with ``owner``'s ``timer_kwargs``.

        Raises:
            ConfigurationError: If they are not those of a StepTimer.
        """
        try:
            return cls(**(timer_kwargs or {}))
        except (ConfigurationError, TypeError) as error:
            raise ConfigurationError(
                f"{owner}(timer_kwargs={timer_kwargs!r}): {error}. There are buffer_size, reduction and sync_cuda."
            ) from error

    def start(self) -> None:
        """A step begins. One that never ended is forgotten."""
        self._start = self._now()

    def stop(self) -> None:
        """The step ends, if one has begun."""
        start, self._start = self._start, None
        if start is not None:
            self.add(self._now() - start)

    def lap(self) -> None:
        """The step ends, if one has begun, and the next one begins."""
        start, self._start = self._start, self._now()
        if start is not None:
            self.add(self._start - start)

    def add(self, seconds: float) -> None:
        """A step took so long."""
        self._durations.append(seconds)

    @property
    def value(self) -> float | None:
        """What the last steps took, in s; None before the first."""
        return self._reduce(self._durations) if self._durations else None

    @property
    def total(self) -> float:
        """The time of the steps that count, in s."""
        return sum(self._durations)


def _now_on_the_gpu_too() -> float:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
