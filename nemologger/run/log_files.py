"""The log files of a run: what Python's logging, its warnings and Lightning say goes to the run directory too.

Attaching changes how the process logs, so it changes as little as it can and takes all of it back: nothing appears on
the console that did not before, nothing disappears from it, and after the release no handler and no open file is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from nemologger.errors import ConfigurationError
from nemologger.run.directory import ERROR_LOG, LIGHTNING_LOG, rank_log

# Lightning's loggers, under the names of its three packages. They keep their messages from the root logger unless that
# one had handlers when Lightning was imported.
_LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
_WARNINGS = "py.warnings"  # as logging.captureWarnings has it


class LogFiles:
    """The log files of one process in a run directory; attached to logging or not. Can be sent to another process.

    Args:
        directory: The run directory.
        local_rank_0_only: Only the first process of each node writes a file of its own.
        global_rank_0_only: Only the first process of the run does.

    Example:
        >>> import tempfile
        >>> files = LogFiles(Path(tempfile.mkdtemp()))
        >>> files.attach(global_rank=0, local_rank=0)
        >>> logging.getLogger("mine").info("3 batches skipped")
        >>> files.release()
    """

    def __init__(self, directory: Path, *, local_rank_0_only: bool = False, global_rank_0_only: bool = False) -> None:
        self._directory = directory
        self._local_rank_0_only = local_rank_0_only
        self._global_rank_0_only = global_rank_0_only
        self._tap: _Tap | None = None

    def attach(self, global_rank: int, local_rank: int) -> None:
        """Log to the files of this rank from now on. Log files of another run are released.

        Raises:
            ConfigurationError: They cannot be written.
        """
        who = (os.getpid(), global_rank, local_rank)
        if self._tap is not None and self._tap.attached and self._tap.who == who:
            return
        for handler in [*logging.getLogger().handlers]:
            if isinstance(handler, _Tap):
                handler.detach()
        writes = not (self._global_rank_0_only and global_rank) and not (self._local_rank_0_only and local_rank)
        name = rank_log(global_rank, local_rank) if writes else None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._tap = _Tap(self._directory, who, name)
        except OSError as error:
            raise ConfigurationError(
                f"rank {global_rank} cannot write its log files to {self._directory}: {type(error).__name__}: {error}. "
                "Make the directory writable from every node, or choose another one with log_dir or explicit_log_dir."
            ) from error

    def release(self) -> None:
        """Close the files and leave logging as it was."""
        if self._tap is not None:
            self._tap.detach()
            self._tap = None

    def note(self, level: int, message: str, error: BaseException | None = None) -> None:
        """Write to the files alone, not to the console; ``error`` with its traceback."""
        if self._tap is not None:
            self._tap.take(_record("nemologger", level, message, error))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tap": None}


class _Tap(logging.Handler):
    """Hears every record that reaches the root logger or Lightning's, and files it."""

    def __init__(self, directory: Path, who: tuple[int, int, int], rank_log: str | None) -> None:
        super().__init__()
        self.who = who
        self.attached = True
        self.seen_warnings = 0
        rank = who[1]
        formatter = logging.Formatter(f"%(asctime)s %(levelname)s [rank {rank}] %(name)s: %(message)s")

        def open_log(name: str, level: int = logging.NOTSET, *, delay: bool = False) -> logging.FileHandler:
            file = _LogFile(directory / name, encoding="utf-8", errors="backslashreplace", delay=delay)
            file.setLevel(level)
            file.setFormatter(formatter)
            self._files.append(file)
            return file

        self._files: list[logging.FileHandler] = []
        try:
            self._own = open_log(rank_log) if rank_log is not None else None
            self._lightning = open_log(LIGHTNING_LOG) if rank == 0 else self._own
            # One file for the run. What other ranks only warn of is in their own; their errors are needed here, too,
            # and few enough not to be in each other's way. Each line says its rank.
            if rank == 0:
                self._errors = open_log(ERROR_LOG, logging.WARNING)
            else:
                self._errors = open_log(ERROR_LOG, logging.ERROR, delay=True)
        except OSError:
            self._close()
            raise

        root = logging.getLogger()
        self._root_level = root.level
        self._filtered: list[tuple[logging.Handler, _AsBefore]] = []
        if root.level > logging.INFO:
            # People expect their logger.info(...) in the file; the handlers that were there keep to their level.
            self._filtered = [(handler, _AsBefore(root.level)) for handler in root.handlers]
            for handler, as_before in self._filtered:
                handler.addFilter(as_before)
            root.setLevel(logging.INFO)
        self._tapped = [root, *(lo for lo in map(logging.getLogger, _LIGHTNING) if root not in _heard_by(lo))]
        for tapped in self._tapped:
            tapped.addHandler(self)
        self._show_warning = _ShowWarning(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.seen_warnings += record.name == _WARNINGS
        self._file(record)
        others = (h for lo in _heard_by(logging.getLogger(record.name)) for h in lo.handlers if h is not self)
        if next(others, None) is None and logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            # Python prints a warning that nobody handles. Ours is not the handler that should silence it.
            logging.lastResort.handle(record)

    def take(self, record: logging.LogRecord) -> None:
        """File ``record`` and show it nowhere else."""
        self.acquire()
        try:
            self._file(record)
        finally:
            self.release()

    def _file(self, record: logging.LogRecord) -> None:
        is_lightning = record.name.partition(".")[0] in {"lightning", "pytorch_lightning", "lightning_fabric"}
        for file in (self._lightning if is_lightning else self._own, self._errors):
            if file is not None and record.levelno >= file.level and self.attached:
                file.emit(record)

    def detach(self) -> None:
        if not self.attached:
            return
        for tapped in self._tapped:
            tapped.removeHandler(self)
        for handler, as_before in self._filtered:
            handler.removeFilter(as_before)
        root = logging.getLogger()
        if self._filtered or self._root_level > logging.INFO == root.level:
            root.setLevel(self._root_level)
        self._show_warning.release()
        self._close()

    def _close(self) -> None:
        self.attached = False
        for file in self._files:
            with contextlib.suppress(OSError):  # of a full disk, for what it still has: how the run ends matters more
                file.close()
        self.close()


class _LogFile(logging.FileHandler):
    """A log file that says once that its disk fails. Python would print its way to here for each line that is logged."""

    _has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it is opened with the first line; Python handles what fails after that
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif logging.raiseExceptions and not self._has_failed and logging.lastResort is not None:
            self._has_failed = True
            message = (
                f"{self.baseFilename} cannot be written: [Errno {error.errno}] {error.strerror}. What is logged meanwhile "
                "may be lost there."
            )
            logging.lastResort.handle(_record("nemologger", logging.WARNING, message))


class _AsBefore(logging.Filter):
    """Lets through what would have been logged while the root logger had ``level``."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= self._level:
            return True
        source: logging.Logger | None = logging.getLogger(record.name)
        while source is not None and source.parent is not None:
            if source.level:
                return True  # it decided for itself
            source = source.parent
        return False


class _ShowWarning:
    """Python's ``warnings.showwarning``, which goes on as it did, and files the warning."""

    def __init__(self, tap: _Tap) -> None:
        self._tap: _Tap | None = tap
        self._original = warnings.showwarning
        warnings.showwarning = self

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        tap = self._tap
        seen = tap.seen_warnings if tap is not None else 0
        self._original(message, category, filename, lineno, file, line)
        # Under logging.captureWarnings the tap has heard it.
        if tap is not None and file is None and tap.seen_warnings == seen:
            tap.take(_record(_WARNINGS, logging.WARNING, f"{filename}:{lineno}: {category.__name__}: {message}"))

    def release(self) -> None:
        # Where something else has wrapped this since, it stays, and only passes on.
        self._tap = None
        if warnings.showwarning is self:
            warnings.showwarning = self._original


def _heard_by(source: logging.Logger) -> list[logging.Logger]:
    """The loggers whose handlers get what ``source`` logs."""
    heard = [source]
    while heard[-1].propagate and heard[-1].parent is not None:
        heard.append(heard[-1].parent)
    return heard


def _record(name: str, level: int, message: str, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord(name, level, __file__, 0, message, None, exc_info)
