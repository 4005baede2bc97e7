"""First weights for a new run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger.checkpoint.load import load_checkpoint
from nemologger.checkpoint_io import check_model
from nemologger.errors import CheckpointError

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class RestoreWeights(Callback):
    """Loads the weights of another run's checkpoint before the first step; not when this run resumes from its own.

    Args:
        checkpoint: The checkpoint's directory, its ``weights/``, or a ``.ckpt`` file of Lightning.
        model: Load the model's parameters and buffers.
        optimizer: Load the optimizers' state too.
    """

    def __init__(self, checkpoint: Path, *, model: bool = True, optimizer: bool = False) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.optimizer = optimizer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load, now that model and optimizers are where they will be used.

        Raises:
            ModelMismatchError: If the checkpoint belongs to a model with other parameters.
            CheckpointError: If it has no optimizer state, and that was asked for.
        """
        if trainer.ckpt_path is None:
            self._load(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same for ``trainer.validate``."""
        if trainer.ckpt_path is None and trainer.state.fn == "validate":
            self._load(trainer, pl_module)

    def _load(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.model and self.checkpoint.is_dir() and pl_module.strict_loading:
            check_model(self.checkpoint, pl_module.state_dict())
        checkpoint: dict[str, Any] = (
            load_checkpoint(self.checkpoint)
            if self.checkpoint.is_dir()
            else trainer.strategy.load_checkpoint(self.checkpoint, weights_only=True)
        )
        if self.model:
            trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        if self.optimizer and trainer.state.fn == "fit":
            if "optimizer_states" not in checkpoint:
                raise CheckpointError(f"{self.checkpoint} holds no optimizer state: set load_optim_state=False")
            trainer.strategy.load_optimizer_state_dict(checkpoint)
        log.info("weights%s restored from %s", " and optimizer state" if self.optimizer else "", self.checkpoint)
