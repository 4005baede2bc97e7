"""A checkpoint to resume from is for one fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback

from nemologger.loading import checkpoint_io

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ResumeOnce(Callback):
    """Forgets ``trainer.ckpt_path`` when the fit that resumed from it has ended.

    Lightning keeps it: a ``validate`` or another ``fit`` of the same trainer would go back to that checkpoint. A fit with
    nothing left to train leaves it: a program that raises ``trainer.fit_loop.max_epochs`` then goes on from it. So does one
    that has only tried things out, as Lightning's ``Tuner`` does: that leaves the path of a file which it has removed.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._trains = self._is_asked_for = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note whether this is what is to be gone on from."""
        self._is_asked_for = stage == "fit" and self._is_path_of(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let what was loaded be used as it is meant, also in a run that saves no checkpoints of ours."""
        checkpoint_io.get_ready(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """There is something left to train."""
        self._trains = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """What was trained is newer now."""
        if not self._is_path_of(trainer):
            if self._is_asked_for and not self._trains:
                trainer.ckpt_path = self.path
            return
        if not self._trains:
            checkpoint_io.keep(trainer, self.path, None)  # it is verified, as it was
        elif stage == "fit":
            trainer.ckpt_path = None

    def _is_path_of(self, trainer: pl.Trainer) -> bool:
        return trainer.ckpt_path is not None and str(trainer.ckpt_path) == self.path
