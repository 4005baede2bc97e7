"""CSV: one file of metrics for all lives of a run."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from nemologger.condition import holds
from nemologger.disk import LocalDisk
from nemologger.disk.there import exists, is_file
from nemologger.errors import ConfigurationError
from nemologger.trackers.hparams_file import write_hparams
from nemologger.trackers.own_file import Entry, FileTracker, LoggedAgain, append, is_whole, put_aside, read_lines

log = logging.getLogger(__name__)

METRICS = "metrics.csv"
HPARAMS = "hparams.yaml"


class CSVLogger(FileTracker, LightningCSVLogger):
    """Metrics in ``metrics.csv`` and hyperparameters in ``hparams.yaml``, as Lightning's CSVLogger writes them.

    Lightning's deletes the metrics of the run's earlier life; this one goes on behind them. Rows that were logged after
    the checkpoint that the run resumes from are dropped, and new metrics become new columns. A run that starts again at
    step 0 in a used directory puts the earlier file aside as ``metrics-0.csv``, ``metrics-1.csv``, …

    Args:
        save_dir: Where to write. Default: the run directory; a relative one is below it.
        name: A directory below ``save_dir``, if any.
        version: A directory below that, if any.
        prefix: Put before the names of metrics, with a hyphen.
        flush_logs_every_n_steps: How many steps may wait in memory where nobody calls ``save``. A Trainer calls it
            each time it has logged.

    Example:
        >>> import tempfile
        >>> logger = CSVLogger(save_dir=tempfile.mkdtemp())
        >>> logger.log_metrics({"loss": 0.5}, step=0)
        >>> logger.save()
        >>> Path(logger.log_dir, "metrics.csv").read_text()
        'step,loss\\n0,0.5\\n'
    """

    def __init__(
        self,
        *,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if not holds(lambda: index(flush_logs_every_n_steps) >= 1):
            raise ConfigurationError(
                f"CSVLogger(flush_logs_every_n_steps={flush_logs_every_n_steps!r}): expected a whole number, at least 1"
            )
        if save_dir is not None and not isinstance(save_dir, str | os.PathLike):
            raise ConfigurationError(f"CSVLogger(save_dir={save_dir!r}): expected a path")
        super().__init__(
            save_dir="." if save_dir is None else os.fspath(save_dir),
            name=name,
            version="" if version is None else version,
            prefix=prefix,
            flush_logs_every_n_steps=flush_logs_every_n_steps,
        )
        self._where, self._name_prefix = save_dir, prefix
        self._writer: MetricsFile | None = None

    apart_by = ", or give one of them a name=..."

    @property
    def place(self) -> str:
        """The file."""
        return str(Path(self.log_dir, METRICS))

    @property
    def is_open(self) -> bool:
        """See :class:`.Tracker`."""
        return self._writer is not None

    @property
    def save_dir(self) -> str:
        """Where it writes, without name and version."""
        return str(self._below("." if self._where is None else self._where))

    @property
    def log_dir(self) -> str:
        """The directory of ``metrics.csv``."""
        version = f"version_{self.version}" if isinstance(self.version, int) else self.version
        return str(Path(self.save_dir, self.name, version))

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The file."""
        if self._writer is None:
            self._writer = MetricsFile(Path(self.log_dir))
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log ``metrics`` at ``step``."""
        super().log_metrics(metrics, step)
        if len(self.experiment.metrics) >= self._flush_logs_every_n_steps:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what has been logged."""
        if self._writer is not None:
            self._outbox.put("rows of metrics", self._writer.save, repeatable=True)

    def _log(self, metrics: dict[str, Any], step: int | None) -> None:
        rest = self._rest(metrics, step)
        if rest:
            LightningCSVLogger.log_metrics(self, rest, step)

    def _end(self, status: str) -> None:
        self.experiment.save()

    def _name_of(self, key: str) -> str:
        return f"{self._name_prefix}{self.LOGGER_JOIN_CHAR}{key}" if self._name_prefix else key

    def _write_params(self, params: dict[str, Any]) -> None:
        self.experiment.log_hparams(params)


class MetricsFile:
    """``metrics.csv`` of one directory, and the rows that are not yet in it.

    Each row has what was logged in one call. The first column is the step; columns only ever join at the right end, by
    rewriting the file.

    Args:
        directory: Made when the first row is written.
    """

    def __init__(self, directory: Path) -> None:
        self.log_dir = str(directory)
        self.metrics: list[dict[str, Any]] = []
        self.hparams: dict[str, Any] = {}
        self._path = directory / METRICS
        self._had_rows = exists(self._path)
        self._is_checked = False
        self._again = LoggedAgain()
        self._columns = self._read_columns()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Remember a row for :meth:`save`."""
        row = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        self.metrics.append({**row, "step": len(self.metrics) if step is None else step})

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Write hyperparameters to ``hparams.yaml``."""
        self.hparams.update(params)
        LocalDisk().make_directory(Path(self.log_dir))
        write_hparams(Path(self.log_dir, HPARAMS), self.hparams)

    def save(self) -> None:
        """Append the rows that were logged since the last call. Those that cannot be written stay for the next call."""
        rows = list(self.metrics)
        new = sorted({key for row in rows for key in row} - {"step"} - {*self._columns})
        if not rows:
            return
        again = [(row["step"], row) for row in rows if self._again.concerns(row["step"])]
        earlier = [_entry(row) for row in self._rows()] if again else []
        gone = self._again.replaced(earlier, again)
        if new or not self._columns or gone or not is_file(self._path):
            columns = [*(self._columns or ["step"]), *new]
            there = [row for number, row in enumerate(self._rows()) if number not in gone]
            self._rewrite([*there, *rows], columns)
            self._again.have_gone(earlier[number] for number in gone)
            self._columns = columns
        else:
            if not self._is_checked:
                if not is_whole(self._path):  # nobody has called drop_from: a script that logs without a Trainer
                    self._rewrite(self._rows(), self._columns)
                self._is_checked = True
            append(self._path, _lines(self._columns, rows))
        del self.metrics[: len(rows)]

    def drop_from(self, step: int) -> None:
        """Drop the rows after ``step``, a last one that is not whole, and later what :class:`.LoggedAgain` says."""
        rows = self._rows()
        kept = [row for row in rows if (_entry(row)[0] or 0) <= step]
        self._again.begin(step, map(_entry, kept))
        if len(kept) < len(rows) or not is_whole(self._path):
            log.info("%s: %d rows after step %d will be logged again", self._path, len(rows) - len(kept), step)
            self._rewrite(kept, self._columns)

    def steps(self) -> dict[str, set[int]]:
        """The steps that each metric has been logged at."""
        steps: dict[str, set[int]] = {}
        for row in self._rows():
            for name in (name for name, value in row.items() if value and row["step"].isdecimal()):
                steps.setdefault(name, set()).add(int(row["step"]))
        return steps

    def put_aside(self) -> None:
        """Begin a new file, if an earlier life has left one."""
        if self._had_rows:
            put_aside(self._path)
            self._columns, self._had_rows = [], False

    def _read_columns(self) -> list[str]:
        if not is_file(self._path):
            return []
        with self._path.open(encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file), [])
        if columns and "step" not in columns:
            put_aside(self._path)  # not ours
            return []
        return columns

    def _rows(self) -> list[dict[str, str]]:
        if not self._columns:
            return []
        text = io.StringIO("".join(read_lines(self._path)), newline="")
        return [row for row in csv.DictReader(text) if row.get("step")]

    def _rewrite(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        header = io.StringIO(newline="")
        csv.writer(header, lineterminator="\n").writerow(columns)
        disk = LocalDisk()
        disk.make_directory(self._path.parent)
        disk.write(self._path, [(header.getvalue() + _lines(columns, rows)).encode()])


def _entry(row: Mapping[str, str]) -> Entry:
    return int(row["step"]) if row["step"].isdecimal() else None, [name for name, value in row.items() if value]


def _lines(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()
