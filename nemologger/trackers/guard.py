"""Lightning's own loggers for TensorBoard and W&B: what keeps them from logging does not end training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from nemologger import lightning_port
from nemologger.trackers import tensorboard
from nemologger.trackers.hparams_file import add_hparams
from nemologger.trackers.outbox import PATIENCE, Outbox

_GUARD = "_nemologger_guard"
_NAMES = ("log_metrics", "save")


def guard(logger: TensorBoardLogger | WandbLogger) -> None:
    """Let what ``logger`` cannot write wait until it can, and training go on. Undone by :func:`release`.

    A full disk, or a W&B process that is gone, would be raised at the next step. What the program itself does wrong, such as
    to log what is no number, is raised as before.
    """
    if _GUARD not in logger.__dict__:
        _Guard(logger)


def tell(logger: Logger, what: str, call: Callable[[], object]) -> None:
    """Make a call of ``logger`` that may fail as its others may.

    Args:
        logger: A guarded one; the call of another is made as it is.
        what: What it is, for the log.
        call: The call.
    """
    guarded = logger.__dict__.get(_GUARD)
    if guarded is None:
        call()
    else:
        guarded.put(what, call)


def release(logger: Logger, *, failed: bool = False) -> None:
    """Have what waits written, as far as it can be, and ``logger`` be as it was.

    Args:
        logger: Any; nothing is done for one that is not guarded.
        failed: The run has failed: do not wait for long.
    """
    guarded = logger.__dict__.get(_GUARD)
    if guarded is not None:
        guarded.release(3 * PATIENCE if failed else None)


class _Guard:
    def __init__(self, logger: TensorBoardLogger | WandbLogger) -> None:
        self._logger = logger
        self._calls = Outbox(type(logger).__name__, beside=False)
        self._log_metrics, self._save = logger.log_metrics, logger.save
        self._has_failed = False
        self._refused: Exception | None = None
        for name in _NAMES:
            setattr(logger, name, getattr(self, name))
        setattr(logger, _GUARD, self)

    def release(self, patience: float | None) -> None:
        self._calls.finish(patience)
        for name in (*_NAMES, _GUARD):
            self._logger.__dict__.pop(name, None)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        given = dict(metrics)
        self.put(f"metrics of step {step}", lambda: self._log_metrics(given, step))

    @rank_zero_only
    def save(self) -> None:
        self.put("what was logged", self._save_all, repeatable=True)

    def _save_all(self) -> None:
        if isinstance(self._logger, TensorBoardLogger):
            # Lightning leaves alone what is there.
            add_hparams(self._logger.log_dir, self._logger.NAME_HPARAMS_FILE, self._logger.hparams)
        self._save()

    def put(self, what: str, call: Callable[[], object], *, repeatable: bool = False) -> None:
        self._calls.put(what, lambda: self._try(call), repeatable=repeatable)
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def _try(self, call: Callable[[], object]) -> None:
        if self._has_failed and isinstance(self._logger, TensorBoardLogger):
            tensorboard.wait_for_a_later_name(self._logger)
            lightning_port.reopen_tensorboard(self._logger)  # the thread that wrote the file is gone
        try:
            call()
            if isinstance(self._logger, TensorBoardLogger):
                self._logger.experiment.flush()  # Lightning does so after each step: here, while it can be tried again
        except Exception as error:  # noqa: BLE001  raised again, here or by put()
            cause = error.__cause__ or error  # Lightning raises another error from TensorBoard's
            self._has_failed = isinstance(cause, OSError) or type(cause).__module__.startswith("wandb.sdk")
            if self._has_failed:
                raise cause from None
            self._refused = error
        else:
            self._has_failed = False
