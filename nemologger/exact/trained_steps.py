"""What the last steps of a run came to, in a file that is there when the process has been killed."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from io import FileIO
from pathlib import Path

from nemologger.disk.local import LocalDisk, write_all

_KEPT = 10_000


class TrainedSteps:
    """The last steps of one line of training: a line of text for each, with its number and its value, in order.

    They are written as they come and not synced: that outlives the process, and need not outlive the machine.

    Args:
        path: The file, in a directory that is there. It is not touched before the first step is added or forgotten.
        machine: Where the run computes, in words. Values from elsewhere are not for comparing.
        kept: How many steps to keep, at least.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     steps = TrainedSteps(Path(directory, "steps"), "1 x cpu")
        ...     steps.add(1, "0.5")
        ...     steps.add(2, "0.25")
        ...     again = TrainedSteps(Path(directory, "steps"), "1 x cpu")
        ...     again.behind(1)
        {2: '0.25'}
    """

    def __init__(self, path: Path, machine: str, kept: int = _KEPT) -> None:
        self._path, self._machine, self._kept = path, machine, kept
        self._file: FileIO | None = None
        #: Where the steps that were found had been computed.
        self.found_on, found = _read(path)
        self._steps: deque[tuple[int, str]] = deque(found, 2 * kept)

    def behind(self, step: int) -> dict[int, str]:
        """The values of the steps after ``step``, by number."""
        return {number: value for number, value in self._steps if number > step}

    def forget_behind(self, step: int) -> None:
        """Leave the steps after ``step`` out: another line of training begins there.

        Raises:
            OSError: If the file cannot be written.
        """
        while self._steps and self._steps[-1][0] > step:
            self._steps.pop()
        self._write_all()

    def add(self, step: int, value: str) -> None:
        """Write down what ``step`` came to.

        Raises:
            OSError: If the file cannot be written.
        """
        if self._steps and self._steps[-1][0] >= step:
            self.forget_behind(step - 1)
        if len(self._steps) == 2 * self._kept:
            self._steps = deque(list(self._steps)[self._kept :], 2 * self._kept)
            self._write_all()
        self._steps.append((step, value))
        if self._file is None:
            self._write_all()
        else:
            self._write(_line(step, value))

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what a network file system has not written it does not write now
                file.close()

    def remove(self) -> None:
        """Remove the file.

        Raises:
            OSError: If that cannot be done.
        """
        self.close()
        LocalDisk().remove(self._path)

    def _write_all(self) -> None:
        # In place: a process that is killed in between leaves fewer steps, never wrong ones.
        if self._file is None:
            self._file = FileIO(self._path, "w")
        else:
            self._file.seek(0)
            self._file.truncate()
        self._write(f"{self._machine}\n".encode() + b"".join(_line(*step) for step in self._steps))

    def _write(self, content: bytes) -> None:
        if self._file is not None:
            write_all(self._file.fileno(), memoryview(content))


def _line(step: int, value: str) -> bytes:
    return f"{step},{value}\n".encode()


def _read(path: Path) -> tuple[str, list[tuple[int, str]]]:
    """Where, and the steps, as far as they are in order and whole."""
    try:
        machine, *lines = path.read_text(errors="replace").splitlines(keepends=True)
    except (OSError, ValueError):
        return "", []
    steps: list[tuple[int, str]] = []
    for line in lines:
        number, _, value = line.partition(",")
        if not (line.endswith("\n") and number.isdecimal()) or (steps and int(number) <= steps[-1][0]):
            break
        steps.append((int(number), value[:-1]))
    return machine.rstrip("\n"), steps
