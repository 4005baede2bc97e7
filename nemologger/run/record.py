"""What a trainer knows of its run: a callback that carries the frozen record, and looks after the log files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port
from nemologger.combination import sweep_job
from nemologger.errors import ConfigurationError
from nemologger.ranks import leave_at_exit
from nemologger.run.directory import RunDirectory
from nemologger.run.log_files import LogFiles

if TYPE_CHECKING:
    import lightning.pytorch as pl


class RunRecord(Callback):
    """Tells whoever has the trainer where its run writes. :func:`run_of` reads it.

    Args:
        run: The run directory.
        settings: What the run was set up with, by name.
        log_files: Attached while the trainer runs.
        is_for_one_start: The directory was named after the time, or numbered: no other start gets the same.
    """

    def __init__(
        self, run: RunDirectory, settings: Mapping[str, Any], log_files: LogFiles, *, is_for_one_start: bool = False
    ) -> None:
        self.run = run
        self.is_for_one_start = is_for_one_start
        self._settings: Mapping[str, Any] | None = dict(settings)
        self._log_files = log_files
        self._is_training = False

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Accept a second setup of the same run, and no other.

        Raises:
            ConfigurationError: ``settings`` differ from those that the run was set up with.
        """
        earlier = self._settings or {}
        others = [key for key, value in settings.items() if not _same(earlier.get(key), value)]
        if others:
            changes = ", ".join(f"{key} was {earlier.get(key)!r}, now {settings[key]!r}" for key in others)
            raise ConfigurationError(
                f"this trainer already has a run directory, {self.run.log_dir}, set up with other settings: {changes}. "
                "Use one NeMoLogger for one trainer, or make a new Trainer for a new run."
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach the log files of this rank; it may be another process than the one of ``NeMoLogger.setup``."""
        lightning_port.forget_decisions()
        leave_at_exit()
        self._log_files.attach(trainer.global_rank, trainer.local_rank)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training has begun."""
        self._is_training = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training has ended by itself."""
        self._is_training = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell a sweep of a ``fit`` that returns before training has ended, because the time of its job is over."""
        job = sweep_job()
        if self._is_training and trainer.global_rank == 0 and job is not None:
            job.postpone(f"training was stopped at step {trainer.global_step}, before its end")
        self._is_training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the traceback to the log files; the console gets it from Python."""
        self.note_end(trainer, exception)

    def note_end(self, trainer: pl.Trainer, exception: BaseException) -> None:
        """Write to the log files what ends the run."""
        level = (
            logging.ERROR if isinstance(exception, Exception) else logging.WARNING
        )  # Ctrl-C, SIGTERM: somebody's wish
        message = f"stopped{lightning_port.step_reached(trainer)} by {type(exception).__name__}: {exception}"
        if lightning_port.forks_later(trainer):  # the ranks had the files, and nobody tells them what has ended them
            self._log_files.attach(trainer.global_rank, trainer.local_rank)
        self._log_files.note(level, message, exception)

    def close_log(self) -> None:
        """Release the log files."""
        self._log_files.release()

    def __getstate__(self) -> dict[str, Any]:
        # What was given to NeMoLogger need not be fit to travel to a process that Lightning spawns.
        return {**self.__dict__, "_settings": None}


class EndOfLog(Callback):
    """Releases the log files when the trainer is done; after the checkpoint callbacks, whose last words it keeps."""

    def __init__(self, log_files: LogFiles) -> None:
        self._log_files = log_files

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the log files."""
        self._log_files.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the log files."""
        self._log_files.release()


@contextmanager
def refusals_noted(trainer: pl.Trainer) -> Iterator[None]:
    """What ends a start in front of ``fit`` is in the log files, as what ends it there is."""
    try:
        yield
    except Exception as error:
        record = record_of(trainer)
        if record is not None:
            record.note_end(trainer, error)
        raise


def close_log(trainer: pl.Trainer) -> None:
    """Release the log files of a run that will not train, or not any more."""
    record = record_of(trainer)
    if record is not None:
        record.close_log()


def record_of(trainer: pl.Trainer) -> RunRecord | None:
    """The run record of ``trainer``, None before ``NeMoLogger.setup``."""
    return next((one for one in lightning_port.callbacks(trainer) if isinstance(one, RunRecord)), None)


def run_of(trainer: pl.Trainer) -> RunDirectory | None:
    """The run directory of ``trainer``, None before ``NeMoLogger.setup``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> run_of(Trainer(accelerator="cpu", logger=False)) is None
        True
    """
    record = record_of(trainer)
    return None if record is None else record.run


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)
