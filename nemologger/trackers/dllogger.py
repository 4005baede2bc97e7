"""DLLogger: NVIDIA's log of JSON lines, written without its package, which is not on PyPI.

The format is the one of ``JSONStreamBackend`` in github.com/NVIDIA/dllogger, dllogger/logger.py: each line is ``DLLL ``
and a JSON object with ``timestamp`` and ``elapsedtime`` (seconds, as strings), ``datetime``, and ``type``: ``LOG`` with
``step`` and ``data``, or ``METADATA`` with ``metric`` and ``metadata``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from nemologger import lightning_port
from nemologger.disk import LocalDisk
from nemologger.disk.there import exists
from nemologger.errors import ConfigurationError
from nemologger.trackers.own_file import Entry, FileTracker, LoggedAgain, append, is_whole, put_aside, read_lines

log = logging.getLogger(__name__)

MARK = "DLLL "
PARAMETER = "PARAMETER"


class DLLogger(FileTracker, Logger):
    """Metrics and hyperparameters as DLLogger's JSON lines, and on the console if wanted.

    A resumed run goes on in the same file: what was logged after the checkpoint that it resumes from is dropped first. A
    run that starts again at step 0 in a used directory puts the earlier file aside as ``dllogger-0.json``, …

    Args:
        verbose: Also write what is logged with ``experiment.log(..., verbosity=1)``.
        stdout: Also write to standard output.
        json_file: The file, below the run directory if it is relative; None for none.

    Example:
        >>> import tempfile
        >>> logger = DLLogger(json_file=tempfile.mkdtemp() + "/log.json")
        >>> logger.log_metrics({"loss": 0.5}, step=3)
        >>> logger.experiment.path.read_text()
        'DLLL {"timestamp": "...", ..., "type": "LOG", "step": 3, "data": {"loss": 0.5}}\\n'
    """

    def __init__(
        self,
        *,
        verbose: bool | None = False,
        stdout: bool | None = False,
        json_file: str | os.PathLike[str] | None = "./dllogger.json",
    ) -> None:
        super().__init__()
        if json_file and not isinstance(json_file, str | os.PathLike):
            raise ConfigurationError(f"DLLogger(json_file={json_file!r}): expected a path")
        self._verbosity, self._stdout, self._json_file = int(bool(verbose)), bool(stdout), json_file
        self._stream: LineStream | None = None
        if not stdout and not json_file:
            log.warning("DLLogger logs nothing: it has neither a json_file nor stdout=True")

    apart_by = ", or give one of them another json_file=..."

    @property
    def place(self) -> str | None:
        """The file."""
        return str(self._below(self._json_file)) if self._json_file else None

    @property
    def is_open(self) -> bool:
        """See :class:`.Tracker`."""
        return self._stream is not None

    @property
    def name(self) -> str:
        """Its class's name: DLLogger knows no experiments."""
        return type(self).__name__

    @property
    def version(self) -> None:
        """None."""
        return

    @property
    def save_dir(self) -> str | None:
        """The directory of the file."""
        return str(self._below(self._json_file).parent) if self._json_file else None

    @property
    @rank_zero_experiment
    def experiment(self) -> LineStream:
        """What writes the lines; it has DLLogger's ``log``, ``metadata`` and ``flush``."""
        if self._stream is None:
            path = self._below(self._json_file) if self._json_file else None
            self._stream = LineStream(path, verbosity=self._verbosity, stdout=self._stdout)
        return self._stream

    def _log(self, metrics: dict[str, Any], step: int | None) -> None:
        """Without a step, it is a summary of the whole run."""
        data = {key: _plain(value) for key, value in self._rest(metrics, step).items()}
        if data:
            self.experiment.log(() if step is None else step, data)

    @rank_zero_only
    def save(self) -> None:
        """Nothing is left to do: each line is in the file when it is logged."""

    def _write_params(self, params: dict[str, Any]) -> None:
        flat = {key: _plain(value) for key, value in lightning_port.flat_params(params).items()}
        if not self.experiment.has_parameters(flat):
            self.experiment.log(PARAMETER, flat)


class LineStream:
    """A file of DLLogger's lines, open from the first line on.

    Args:
        path: The file; None for none.
        verbosity: Messages of a higher one are left out.
        stdout: Also write to standard output.
    """

    def __init__(self, path: Path | None, *, verbosity: int = 0, stdout: bool = False) -> None:
        self.path = path
        self._verbosity, self._stdout = verbosity, stdout
        self._start = time.time()
        self._had_lines = path is not None and exists(path)
        self._is_checked = False
        self._again = LoggedAgain()
        self._units: dict[str, str] = {}

    def log(self, step: int | str | tuple[int, ...], data: Mapping[str, Any], verbosity: int = 0) -> None:
        """Write ``data`` of ``step``: a number, ``"PARAMETER"``, or a tuple such as epoch and iteration."""
        if verbosity > self._verbosity:
            return
        if isinstance(step, int) and self._again.concerns(step):
            lines = self._lines()
            entries = [_entry(line) for line in lines]
            gone = self._again.replaced(entries, [(step, data)])
            if gone and self.path is not None:
                kept = [line for number, line in enumerate(lines) if number not in gone]
                LocalDisk().write(self.path, ["".join(kept).encode()])
                self._again.have_gone(entries[number] for number in gone)
        now = self._write("LOG", step=step, data=dict(data))
        if self._stdout:
            values = (f"{key} : {value} {self._units.get(key, '')}" for key, value in data.items())
            sys.stdout.write(f"DLL {now} - {step} {' '.join(values)}\n")

    def metadata(self, metric: str, metadata: Mapping[str, Any]) -> None:
        """Write what is known of a metric, for example ``{"unit": "images/s"}``."""
        self._units[metric] = str(metadata.get("unit", ""))
        self._write("METADATA", metric=metric, metadata=dict(metadata))

    def flush(self) -> None:
        """Nothing is left to do: each line is in the file when it is logged."""

    def has_parameters(self, data: Mapping[str, Any]) -> bool:
        """Whether the parameters last written are ``data``."""
        written = [entry["data"] for entry in map(_parse, self._lines()) if entry.get("step") == PARAMETER]
        return bool(written) and written[-1] == json.loads(json.dumps(data))

    def drop_from(self, step: int) -> None:
        """Drop the lines after ``step``, a last one that is not whole, and later what :class:`.LoggedAgain` says."""
        lines = self._lines()
        kept = [line for line in lines if not _is_from(_parse(line), step + 1)]
        self._again.begin(step, map(_entry, kept))
        if self.path is not None and (len(kept) < len(lines) or not is_whole(self.path)):
            log.info("%s: %d lines after step %d will be logged again", self.path, len(lines) - len(kept), step)
            LocalDisk().write(self.path, ["".join(kept).encode()])

    def steps(self) -> dict[str, set[int]]:
        """The steps that each metric has been logged at."""
        steps: dict[str, set[int]] = {}
        for entry in map(_parse, self._lines()):
            if _is_from(entry, 0):
                for name in entry["data"]:
                    steps.setdefault(name, set()).add(entry["step"])
        return steps

    def put_aside(self) -> None:
        """Begin a new file, if an earlier life has left one."""
        if self._had_lines and self.path is not None:
            put_aside(self.path)
            self._had_lines = False

    def _lines(self) -> list[str]:
        return [] if self.path is None else read_lines(self.path)

    def _write(self, kind: str, **entry: Any) -> datetime:
        now = datetime.now()  # noqa: DTZ005  the format has local time without a zone
        if self.path is None:
            return now
        if not self._is_checked:
            LocalDisk().make_directory(self.path.parent)
            if not is_whole(self.path):
                LocalDisk().write(self.path, ["".join(self._lines()).encode()])
        self._is_checked = False  # until this is written, too
        head = {
            "timestamp": str(now.timestamp()),
            "datetime": str(now),
            "elapsedtime": str(round(now.timestamp() - self._start, 6)),
            "type": kind,
        }
        append(self.path, f"{MARK}{json.dumps({**head, **entry})}\n")
        self._is_checked = True
        return now


def _parse(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line.removeprefix(MARK))
    except ValueError:
        return {}  # another program's line: it stays
    return entry if isinstance(entry, dict) else {}


def _is_from(entry: Mapping[str, Any], step: int) -> bool:
    logged = entry.get("step")
    return isinstance(logged, int) and logged >= step


def _entry(line: str) -> Entry:
    entry = _parse(line)
    step = entry.get("step")
    return step if isinstance(step, int) else None, [*entry.get("data", ())]


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()  # of NumPy and torch; a number if it is one
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
