"""A checkpoint to resume from is for one fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback

from nemologger.loading import checkpoint_io

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ResumeOnce(Callback):
    """Forgets ``trainer.ckpt_path`` when the fit that resumed from it has ended.

    Lightning keeps it: a ``validate`` or another ``fit`` of the same trainer would go back to that checkpoint.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let what was loaded be used as it is meant, also in a run that saves no checkpoints of ours."""
        checkpoint_io.get_ready(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """What was trained is newer now."""
        if stage == "fit" and trainer.ckpt_path is not None and str(trainer.ckpt_path) == self.path:
            trainer.ckpt_path = None
