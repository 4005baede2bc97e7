"""Which GPUs a combination sees when several run side by side on one machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemologger.disk.lock import DirectoryLock
from nemologger.errors import DirectoryInUseError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` calls them."""
    listed = environment.get(VISIBLE)
    if listed is not None:
        return tuple(filter(None, (name.strip() for name in listed.split(","))))
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


def groups(devices: Sequence[str], wanted: Any) -> list[tuple[str, ...]]:
    """``devices`` in groups for one combination each; empty if a combination is to see them all.

    Args:
        devices: All there are.
        wanted: ``Trainer(devices=...)`` of a combination; None if its configuration does not say, which counts as 1.

    Example:
        >>> groups(["0", "1", "2", "3"], 2)
        [('0', '1'), ('2', '3')]
        >>> groups(["0", "1"], "auto")
        []
    """
    if isinstance(wanted, str) and wanted.isdecimal():
        wanted = int(wanted)
    size = 1 if wanted is None else wanted
    if not isinstance(size, int) or not 0 < size <= len(devices):
        return []  # all of them, or a choice of its own
    return [tuple(devices[i : i + size]) for i in range(0, len(devices) - size + 1, size)]


class Slot:
    """A place for one combination on one group of devices, until it is released or its process ends.

    Args:
        devices: The group.
        lock: Held meanwhile.
    """

    def __init__(self, devices: tuple[str, ...], lock: DirectoryLock) -> None:
        self.devices = devices
        self._lock = lock

    def release(self) -> None:
        """Let another combination have it."""
        self._lock.release()


def take(directory: Path, choices: Sequence[tuple[str, ...]], per_group: int) -> Slot:
    """A place on the least used group of ``choices``; waits while all are taken.

    Args:
        directory: Where the places are kept, the same for all combinations of a sweep.
        choices: The groups.
        per_group: How many combinations may share one.
    """
    while True:
        for layer in range(per_group):
            for group in choices:
                place = directory / f"{'_'.join(group).replace(os.sep, '_')}-{layer}"
                place.mkdir(parents=True, exist_ok=True)
                lock = DirectoryLock(place)
                try:
                    lock.take()
                except DirectoryInUseError:
                    continue
                return Slot(group, lock)
        time.sleep(0.5)
