"""After a resume every step is logged once, by all loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from nemologger import lightning_port
from nemologger.trackers import guard, last_call, tensorboard, wandb
from nemologger.trackers.tracker import Tracker, check_apart

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ContinuedSteps(Callback):
    """Sees to it that after a resume every step is logged once, by all loggers.

    An earlier life may have logged steps after its last checkpoint. Each logger deals with them as it can: TensorBoard
    declares them void, files of our own drop them, other trackers leave them out when they come again.
    A logger that fails when it is ended neither makes the run fail nor replaces what it ends with; nor does one for
    TensorBoard or W&B that cannot write for a while. ``NeMoLogger.setup`` installs this callback; without a NeMoLogger, give
    it to the Trainer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[ContinuedSteps()])
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._step: int | None = None
        self._has_own_steps = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose steps they are."""
        self._trainer = trainer
        check_apart(trainer.loggers)
        for logger in trainer.loggers:
            if isinstance(logger, (TensorBoardLogger, WandbLogger)):
                guard.guard(logger)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget it again."""
        self._trainer = None
        for logger in trainer.loggers:
            guard.release(logger)
            if isinstance(logger, WandbLogger):
                wandb.log_all(logger)
            last_call.may_fail(logger)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """See to it that the exception stays the one that the run ends with."""
        for logger in trainer.loggers:
            guard.release(logger, failed=True)
            last_call.may_fail(logger)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the loggers how training begins."""
        has_trained = lightning_port.steps_taken(trainer) > 0
        resumed = trainer.ckpt_path is not None and has_trained
        self._step = lightning_port.next_logged_step(trainer) if resumed else None
        if not resumed and has_trained:
            return  # a second fit of this process
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if resumed:
                    self._go_on(logger, self._step or 0)
                else:
                    self._start_over(logger)

    def _go_on(self, logger: Logger, step: int) -> None:
        if isinstance(logger, Tracker):
            logger.go_on(None if self._has_own_steps else step)
        elif isinstance(logger, WandbLogger):
            wandb.leave_out_logged(logger)
        elif isinstance(logger, TensorBoardLogger) and not self._has_own_steps:
            _void_from(logger, step)

    def _start_over(self, logger: Logger) -> None:
        if isinstance(logger, Tracker):
            logger.start_over()
        elif isinstance(logger, TensorBoardLogger) and tensorboard.has_earlier_files(logger):
            # Also a run that died before its first checkpoint, and starts again from step 0.
            _void_from(logger, 0)

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


def _void_from(logger: TensorBoardLogger, step: int) -> None:
    guard.tell(logger, "how training begins", lambda: tensorboard.void_from(logger, step))
