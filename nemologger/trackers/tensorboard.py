"""TensorBoard: its place in the run directory, and curves that go on where the resumed checkpoint was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from nemologger import lightning_port
from nemologger.run_dir import RunDirectory

if TYPE_CHECKING:
    import lightning.pytorch as pl


def move(logger: TensorBoardLogger, run: RunDirectory, homes: Iterable[str | Path], *, is_default: bool) -> None:
    """Let ``logger`` write to ``exp_dir / save_dir / <its name> / <version>``.

    Args:
        logger: Not open yet.
        run: The run.
        homes: As for :meth:`~nemologger.run_dir.RunDirectory.tracker_dir`.
        is_default: It is the one that a Trainer makes by itself: nobody chose its name, and runs that share it would be
            drawn as one. It writes to the run directory.
    """
    if is_default:
        save_dir, name = run.exp_dir, run.name
    else:
        save_dir, name = run.tracker_dir(logger.save_dir, homes), logger.name
    lightning_port.move_tensorboard(logger, save_dir, name, run.version or "")
    if _event_files(logger):
        # The placeholder metric is logged at step 0 by every life of the run.
        lightning_port.move_tensorboard(logger, save_dir, name, run.version or "", default_hp_metric=False)


class ContinuedSteps(Callback):
    """Sees to it that after a resume every step is logged once, by all loggers.

    The steps that the earlier life logged after its last checkpoint are declared void in TensorBoard's own way, by a
    session start at the step that is logged next. They stay in the event files, TensorBoard no longer shows them.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._step: int | None = None
        self._has_own_steps = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose steps they are."""
        self._trainer = trainer

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget it again."""
        self._trainer = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Void what the earlier life logged from here on."""
        resumed = trainer.ckpt_path is not None and trainer.global_step > 0
        self._step = lightning_port.next_logged_step(trainer) if resumed else None
        if (not resumed and trainer.global_step > 0) or self._has_own_steps:
            return  # a second fit of this process; or steps in a unit that only the model knows
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger) or not trainer.is_global_zero:
                continue
            # Also a run that died before its first checkpoint, and starts again from step 0.
            if resumed or len(_event_files(logger)) > 1:
                _start_session(logger, self._step or 0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Number the first batch as the uninterrupted run would have: Lightning skips a step in some resumes."""
        if self._step is not None:
            lightning_port.set_next_logged_step(trainer, self._step)
            self._step = None

    def state_dict(self) -> dict[str, Any]:
        """Whether the model logs under a ``step`` of its own; nothing in the usual case that it does not."""
        own = self._has_own_steps or (self._trainer is not None and "step" in self._trainer.logged_metrics)
        return {"has_own_steps": True} if own else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` said."""
        self._has_own_steps = bool(state_dict.get("has_own_steps", False))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}


def _event_files(logger: TensorBoardLogger) -> list[Path]:
    directory = Path(logger.log_dir)
    return [*directory.glob("events.out.tfevents.*")] if directory.is_dir() else []


def _start_session(logger: TensorBoardLogger, step: int) -> None:
    # Here: TensorBoard's classes are loaded when there is a writer, which has loaded them.
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

    writer = logger.experiment
    if writer.file_writer is None:
        writer.purge_step = step  # it writes the same event when it opens its next file
    else:
        writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
