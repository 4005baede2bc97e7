"""What Lightning does on Slurm's signal that a job's time is nearly over, and what it takes up in the job's next life.

It saves to ``hpc_ckpt_<n>.ckpt`` in the trainer's ``default_root_dir``, as a rule the working directory. Under Slurm it
loads the newest of these wherever no ``ckpt_path`` is given, whichever run and job has left it there.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from inspect import unwrap
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

if TYPE_CHECKING:
    from types import FrameType

log = logging.getLogger(__name__)

_CALLS = (pl.Trainer.fit, pl.Trainer.validate, pl.Trainer.test, pl.Trainer.predict)
_ENTRIES = {unwrap(call).__code__ for call in _CALLS}  # a tracker may have wrapped them, to log by itself
_UNKNOWN = ""  # as if something had been asked for


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """The signal on which Lightning would save and have the job requeued; None where it would not."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def on_requeue_signal(trainer: pl.Trainer, receive: Callable[[int, FrameType | None], None]) -> Callable[[], None]:
    """For ``setup``: have ``receive`` called on :func:`requeue_signal` instead, and return what undoes that.

    As with SIGTERM, Lightning puts it in place when all is set up; not where the program has a handler of its own.
    """
    connector = trainer._signal_connector
    connector._slurm_sigusr_handler_fn = receive  # type: ignore[method-assign,assignment]
    return lambda: connector.__dict__.pop("_slurm_sigusr_handler_fn", None)


def requeue_file(trainer: pl.Trainer) -> str | None:
    """What a fit that is told nothing else goes on from under Slurm; None after :func:`leave_requeue_files`."""
    connector = trainer._checkpoint_connector
    is_lightnings = type(connector) is _CheckpointConnector and SLURMEnvironment.detect()
    return connector._hpc_resume_path if is_lightnings else None


def leave_requeue_files(trainer: pl.Trainer) -> None:
    """For ``setup``: from this call of the trainer on, load no such file that was not asked for (``ckpt_path="hpc"``)."""
    connector = trainer._checkpoint_connector
    if type(connector) is not _CheckpointConnector:
        return
    chosen = None  # before this callback had its turn
    if not connector._user_managed and _asked(trainer) is None and SLURMEnvironment.detect():
        chosen = connector._hpc_resume_path
    connector.__class__ = _Connector
    vars(connector)["refused"] = chosen


def go_on_from(trainer: pl.Trainer, path: str) -> None:
    """For ``setup``, behind :func:`leave_requeue_files`: the fit goes on from ``path`` if it was asked for nothing else."""
    vars(trainer._checkpoint_connector)["own"] = path


def goes_on_elsewhere(trainer: pl.Trainer) -> bool:
    """For ``setup``, behind :func:`leave_requeue_files`: whether the fit was told where to go on from."""
    return trainer.ckpt_path not in (None, vars(trainer._checkpoint_connector).get("refused"))


class _Connector(_CheckpointConnector):
    """Lightning's, which looks for no files of other runs.

    Attributes:
        asked: What the call under way was given.
        refused: What was chosen for it without being asked for.
        own: What it goes on from in that case.
        told: That such a file is there.
    """

    asked: Any = None
    refused: str | None = None
    own: str | None = None
    told = False

    @property
    def _hpc_resume_path(self) -> str | None:
        found = super()._hpc_resume_path
        if found is None or self.asked == "hpc":
            return found
        self._tell(found)
        return None

    def _parse_ckpt_path(self, state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool) -> Any:
        self.asked, self.refused, self.own = ckpt_path, None, None
        return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        if checkpoint_path is not None and checkpoint_path == self.refused:
            self._tell(checkpoint_path)
            checkpoint_path = None
        if checkpoint_path is None:  # else it may be a finder of learning rates, which goes back to where it began
            checkpoint_path, self.own = self.own, None
        super().resume_start(checkpoint_path, weights_only)

    def _tell(self, path: str) -> None:
        if not self.told and self.trainer.is_global_zero:
            log.warning(
                "%s is not loaded: Lightning has left it there when Slurm requeued a job, perhaps another one, and would "
                "go on from it in every run of this directory that is not told where to go on from. To go on from it, pass "
                'ckpt_path="hpc" to the trainer; else remove it.',
                path,
            )
        self.told = True


def _asked(trainer: pl.Trainer) -> Any:
    """The ``ckpt_path`` that the call under way was given. Lightning has replaced it by its own choice before ``setup``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in _ENTRIES and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path", _UNKNOWN)
        frame = frame.f_back
    return _UNKNOWN
