"""A training script for tests that need real processes: ``train_toy.py DIRECTORY STEPS [--option value ...]``.

It writes a line ``step loss`` per step into ``DIRECTORY/losses-<rank>.txt``.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader
from toy import BATCH, ToyData, ToyDataModule, ToyModel, quiet_trainer

import nemologger as nl


class Forgetful(ToyModel):
    """Drops out."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return super().training_step(torch.nn.functional.dropout(batch, 0.3), batch_idx)


class Shuffled(ToyDataModule):
    """Another order in each epoch."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(ToyData(), batch_size=BATCH, shuffle=True, num_workers=self.workers)


class Noisy(ToyData):
    """Draws from all three generators for each sample, in whatever process asks for it."""

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.rand(8) + random.random() + float(np.random.rand())
        return super().__getitem__(index) + 0.1 * noise


class Augmented(ToyDataModule):
    """Another order in each epoch, and other noise; read by ``workers`` processes."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=self.workers)


class WriteLosses(pl.Callback):
    """Writes each step's loss down at once."""

    def __init__(self, directory: Path, pause: float) -> None:
        self.directory, self.pause = directory, pause

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (self.directory / f"losses-{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{trainer.global_step} {outputs['loss'].item()!r}\n")
        time.sleep(self.pause)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--beside", action="store_true", help="async_save")
    parser.add_argument("--dirpath", help="where the checkpoints go, a URL for one")
    parser.add_argument("--files", type=int, default=2, help="weights files per rank")
    parser.add_argument("--workers", type=int, help="augment the data, in so many processes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.workers is not None:
        pl.seed_everything(1, verbose=False)  # a life that ends before its first checkpoint is to start again the same
    options.directory.mkdir(parents=True, exist_ok=True)
    trainer = quiet_trainer(
        max_steps=options.steps,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        val_check_interval=options.every,
        callbacks=[WriteLosses(options.directory, options.pause)],
        use_distributed_sampler=options.workers is not None,
    )
    ckpt = nl.ModelCheckpoint(
        filename="{step}",
        every_n_train_steps=options.every,
        save_top_k=2,
        async_save=options.beside,
        dirpath=options.dirpath,
        files_per_rank=options.files,
    )
    nl.train(
        Forgetful(width=options.width),
        Shuffled() if options.workers is None else Augmented(options.workers),
        trainer,
        nl.NeMoLogger(name="toy", log_dir=options.directory, ckpt=ckpt),
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
    )


if __name__ == "__main__":
    main()
