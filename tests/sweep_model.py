"""What the script of the tests of sweeps trains."""

from __future__ import annotations

import os
import time

import lightning.pytorch as pl
import torch
from toy import ToyModel

import nemologger as nl


class SteppedModel(ToyModel):
    """With a learning rate to choose."""

    def __init__(self, lr: float, width: int) -> None:
        super().__init__(width)
        self.save_hyperparameters()
        self.lr = lr

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Diary(pl.Callback):
    """Writes a line ``process step`` per step into the run's directory."""

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 0:
            with (nl.run_of(trainer).log_dir / "diary.txt").open("a") as file:
                file.write(f"{os.getpid()} {trainer.global_step}\n")
        time.sleep(self.pause)
