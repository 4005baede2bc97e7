"""How long it takes from one step's end to the next, for the log file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger.callbacks.step_timer import StepTimer
from nemologger.context.mixin import IOMixin

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class DeltaTimingCallback(IOMixin, Callback):
    """Writes the time from the end of one step to the end of the next into the log: loading the batch included.

    A line per step, ``Step 12: train_step_timing in s=0.0345``, with level INFO, as NeMo does; likewise
    ``validation_step_timing in s`` and ``test_step_timing in s``. Loggers such as TensorBoard are not involved. Steps are
    counted from 0 in each epoch. The clock starts with the epoch, and again after a validation in the middle of it, so that
    the first step after that is not longer than others.

    Args:
        timer_kwargs: As for :class:`~nemologger.callbacks.timing.TimingCallback`.

    Raises:
        ConfigurationError: If ``timer_kwargs`` holds anything else.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DeltaTimingCallback()], logger=False, accelerator="cpu")
    """

    def __init__(self, timer_kwargs: Mapping[str, Any] | None = None) -> None:
        self._train, self._validation, self._test = (
            StepTimer.made_of(type(self).__name__, timer_kwargs) for _ in range(3)
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run may go on in the middle of an epoch."""
        self._train.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first training step begins."""
        self._train.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A training step ends, the next one begins."""
        _lap(self._train, "train_step_timing in s", batch_idx)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first validation step begins."""
        self._validation.start()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation step ends, the next one begins."""
        _lap(self._validation, "validation_step_timing in s", batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on."""
        self._train.start()

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first test step begins."""
        self._test.start()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A test step ends, the next one begins."""
        _lap(self._test, "test_step_timing in s", batch_idx)


def _lap(timer: StepTimer, name: str, batch_idx: int) -> None:
    timer.lap()
    log.info("Step %d: %s=%.6f", batch_idx, name, timer.value or 0.0)
