"""End training after some epochs, for whoever makes new labels between two starts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port
from nemologger.combination import sweep_job
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class IPLEpochStopper(IOMixin, Callback):
    """Ends each start of a run after some epochs; the next start resumes, and trains as many again.

    In between, iterative pseudo-labelling (NeMo's TopIPL, arxiv.org/abs/2506.07659) makes the labels of the next epochs.
    ``fit`` ends as usual, with a checkpoint; the run is over when it has come to the trainer's ``max_epochs`` or
    ``max_steps``. Resumed in the middle of an epoch, its rest counts as one.

    Args:
        enable_stop: With False it does nothing.
        stop_every_n_epochs: How many epochs a start trains.

    Raises:
        ConfigurationError: ``stop_every_n_epochs`` is no number of epochs.

    Example:
        >>> IPLEpochStopper(stop_every_n_epochs=2).stop_every_n_epochs
        2
    """

    def __init__(self, enable_stop: bool = True, stop_every_n_epochs: int = 1) -> None:
        if not holds(lambda: int(stop_every_n_epochs) == stop_every_n_epochs >= 1):
            raise ConfigurationError(
                f"IPLEpochStopper(stop_every_n_epochs={stop_every_n_epochs!r}): expected how many epochs a start trains, "
                "1 or more"
            )
        self.enable_stop, self.stop_every_n_epochs = enable_stop, stop_every_n_epochs
        self._epochs = 0
        self._has_trained = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Epochs count from here."""
        self._epochs, self._has_trained = 0, False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The epoch is one that counts: resumed behind its last batch, an earlier one may only come to its end."""
        self._has_trained = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop, if that is the last one of this start, and others are to follow."""
        self._epochs, self._has_trained = self._epochs + self._has_trained, False
        if not self.enable_stop or self._epochs < self.stop_every_n_epochs or lightning_port.is_over(trainer):
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            said = f"epoch {trainer.current_epoch} is trained: this start ends here, the next one goes on"
            log.info("%s", said)
            job = sweep_job()
            if job is not None:
                job.postpone(said)
