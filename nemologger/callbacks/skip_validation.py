"""Train first after a resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port
from nemologger.context.mixin import IOMixin

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SkipValidationOnResume(IOMixin, Callback):
    """A run that resumes from a checkpoint takes a training step before it validates.

    Lightning does not repeat a validation that a checkpoint was saved behind, so there is little to skip, and with
    ``nemologger.ModelCheckpoint`` the losses are the same with and without this. What is left out:

    - the sanity check, which Lightning runs when it resumes a run that was saved at the end of an epoch;
    - the rest of a validation that was interrupted (a checkpoint saved by ``save_on_exception``, or by a signal's handler,
      in the middle of one). Lightning would go on with its next batch, and log and monitor the mean of those that remain;
      ``nemologger.ModelCheckpoint`` has one that an exception has interrupted done anew.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SkipValidationOnResume()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._sanity_steps: int | float | None = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The run resumes: no sanity check."""
        if self._sanity_steps is None:
            self._sanity_steps = trainer.num_sanity_val_steps
            trainer.num_sanity_val_steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a validation that was interrupted for done; another fit of this trainer has its sanity check."""
        self._give_back(trainer)
        lightning_port.drop_interrupted_validation(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """It did not come to training."""
        self._give_back(trainer)

    def _give_back(self, trainer: pl.Trainer) -> None:
        if self._sanity_steps is not None:
            trainer.num_sanity_val_steps = self._sanity_steps
            self._sanity_steps = None
