"""Files of lines that this package writes itself, life after life of a run."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from nemologger.disk import LocalDisk
from nemologger.disk.there import exists, is_file
from nemologger.trackers.tracker import Logged, Tracker


class MetricsByStep(Protocol):
    """A file of metrics that an earlier life of the run may have begun."""

    def drop_from(self, step: int) -> None:
        """Drop what is after ``step``, a last line that is not whole, and later what :class:`LoggedAgain` says."""

    def steps(self) -> dict[str, set[int]]:
        """The steps that each metric has been logged at."""

    def put_aside(self) -> None:
        """Begin a new file, if an earlier life has left one."""


#: What an entry of a file has: the step, if it is one, and the names of its metrics.
Entry = tuple[int | None, Collection[str]]

#: What Lightning logs with all metrics.
_WITH_ALL = {"step", "epoch"}


class FileTracker(Tracker):
    """A tracker whose ``experiment`` is a file that this package writes."""

    _is_remote = False

    @property
    def experiment(self) -> MetricsByStep:
        """The file."""
        raise NotImplementedError

    def _go_on(self, step: int | None) -> None:
        """Drop what an earlier life logged from ``step`` on; leave it out later if its place is not known."""
        if step is not None:
            self.experiment.drop_from(step)
        else:
            steps = self.experiment.steps()
            self._logged = Logged(lambda name: steps.get(name, ()))

    def _start_over(self) -> None:
        """Put the file of an earlier life aside."""
        self.experiment.put_aside()


class LoggedAgain:
    """What stands at the step that a resumed run begins with, and at the one before: it goes when it is logged again.

    Most at the first is the next step of an earlier life that had gone on. What was tested after a finished fit stands
    there, too, and a run that gets more steps does not log it again. What is logged for an epoch is at the step before: it
    comes after the checkpoint that is saved in its last validation. What that validation logged stands there, too, is from
    before the checkpoint, and may have the same names. So each entry that is logged takes the place of a single one: the
    newest that has one of its metrics.
    """

    def __init__(self) -> None:
        self._left: Counter[int | None] = Counter()

    def begin(self, step: int, entries: Iterable[Entry]) -> None:
        """The run goes on at ``step``; ``entries`` are what the file has."""
        self._left = Counter(at for at, _ in entries if at in {step - 1, step})

    def concerns(self, step: object) -> bool:
        """Whether what is logged at ``step`` may take the place of something."""
        return isinstance(step, int) and self._left[step] > 0

    def replaced(self, entries: Sequence[Entry], logged: Iterable[Entry]) -> set[int]:
        """The numbers of the ``entries`` that go, since ``logged`` are there now."""
        gone: set[int] = set()
        for step, names in logged:
            mine = [number for number, (at, _) in enumerate(entries) if at == step][: self._left[step]]
            again = [number for number in mine if {*entries[number][1]} & {*names} - _WITH_ALL and number not in gone]
            gone.update(again[-1:])
        return gone

    def have_gone(self, entries: Iterable[Entry]) -> None:
        """These are no longer in the file."""
        self._left.subtract(at for at, _ in entries)


def read_lines(path: Path) -> list[str]:
    """The lines of ``path`` with their ends; without a last one that a killed process did not write to its end."""
    if not is_file(path):
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return [line for line in file if line.endswith("\n")]


def append(path: Path, text: str) -> None:
    """Write ``text`` to the end of ``path``, or nothing of it.

    Raises:
        OSError: It could not be written.
    """
    size = path.stat().st_size if is_file(path) else 0
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
    except BaseException:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def is_whole(path: Path) -> bool:
    """Whether the last line of ``path`` was written to its end."""
    if not is_file(path) or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def put_aside(path: Path) -> Path:
    """Rename ``metrics.csv`` to the first of ``metrics-0.csv``, ``metrics-1.csv``, … that is free."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count())
    aside = next(name for name in numbered if not exists(name))
    LocalDisk().rename(path, aside)
    return aside
