"""Train a toy straight through, then again from each of its checkpoints, and compare every loss."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

import nemologger as nl

SAMPLES = 22
BATCH = 4  # six batches, the last of two samples
STEPS = 14
SELDOM = {"every_n_train_steps": 1_000_000, "every_n_epochs": None}


class Augmented(Dataset[torch.Tensor]):
    """Draws from every global generator for each sample."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.rand(1).item() + np.random.rand() + np.random.normal() + random.random()
        return torch.sin(torch.arange(4, dtype=torch.float32) + index) + noise


class Net(pl.LightningModule):
    """Dropout, and noise from python and numpy. It remembers the loss of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.note(self.loss(batch))

    def loss(self, batch: Any) -> torch.Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
        losses = [(self.net(part.float()) - 1).pow(2).mean() for part in parts if part is not None]
        return torch.stack(losses).sum() * (1 + random.random() + np.random.rand())

    def note(self, loss: torch.Tensor) -> torch.Tensor:
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).mean() + torch.rand(1, device=self.device) + np.random.rand())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]


class Saved(Checkpoint):
    """Notes how many batches had been trained on when a checkpoint was saved, and stops a run after one."""

    def __init__(self, ckpt: nl.ModelCheckpoint, stop_at: int | None = None) -> None:
        self.ckpt = ckpt
        self.stop_at = stop_at
        self.batches: dict[int, int] = {}

    def _look(self, pl_module: Net) -> None:
        step = self.ckpt._saved_at[0]
        if step and step not in self.batches:
            self.batches[step] = len(pl_module.losses)
            if step == self.stop_at:
                raise Stopped

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._look(pl_module)  # a save behind the module's own on_train_batch_end is behind ours, too

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._look(pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._look(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self._look(pl_module)

    def on_train_end(self, trainer, pl_module):
        self._look(pl_module)


class Stopped(Exception):
    """A run was stopped on purpose."""


@dataclass
class Case:
    """What to train with what. Everything is made anew for each run."""

    data: Callable[[], Any]
    model: Callable[[], Net] = Net
    trainer: dict[str, Any] = field(default_factory=dict)
    ckpt: dict[str, Any] = field(default_factory=dict)
    at: Iterable[int] | None = None
    steps: int = STEPS
    callbacks: Callable[[], list[Any]] = list
    same_seed: bool = False  # on all ranks


def shuffled(**options: Any) -> DataLoader[torch.Tensor]:
    return DataLoader(Augmented(), **{"batch_size": BATCH, "shuffle": True, **options})


def train(case: Case, directory: Path, seed: int, resume: Path | None = None, stop_at: int | None = None) -> Any:
    """One run; returns its losses, the notes on its checkpoints, and its trainer."""
    seed += 100_000 * int(os.environ.get("RANK", 0)) * (not case.same_seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    ckpt = nl.ModelCheckpoint(
        **{
            "monitor": None, "every_n_train_steps": 1, "save_top_k": -1, "save_last": False, "filename": "{step}",
            "dirpath": directory, "always_save_context": False, "save_context_on_train_end": False, "verbose": False,
            **case.ckpt, **(SELDOM if resume is not None and stop_at is None else {}),
        }
    )  # fmt: skip
    saved = Saved(ckpt, stop_at)
    options = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": -1,
        "enable_model_summary": False, "max_steps": case.steps, "val_check_interval": 3, "check_val_every_n_epoch": None,
        "limit_val_batches": 2, "num_sanity_val_steps": 2, **case.trainer,
    }  # fmt: skip
    if callable(options.get("strategy")):  # each trainer has its own
        options["strategy"] = options["strategy"]()
    trainer = pl.Trainer(callbacks=[*case.callbacks(), ckpt, saved], **options)
    data, model = case.data(), case.model()
    arguments = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"train_dataloaders": data}
    if "val_dataloaders" not in arguments and "datamodule" not in arguments:
        arguments["val_dataloaders"] = DataLoader(Augmented(), batch_size=BATCH)
    with suppress(Stopped):
        trainer.fit(model, ckpt_path=resume, **arguments)
    return model.losses, saved.batches, trainer


def check(case: Case, directory: Path) -> None:
    """Fail at the first checkpoint from which another loss follows than in the run that was not stopped."""
    straight, batches, _ = train(case, directory / "straight", seed=1)
    assert len(straight) >= STEPS - 2
    assert len(set(straight)) > len(straight) // 2
    wrong = {}
    for step in case.at or range(1, case.steps):
        losses, _, _ = train(case, directory / f"from-{step}", 1000 + step, directory / "straight" / f"step={step}")
        expected = straight[batches[step] :]
        if losses != expected:
            differs = [i for i, (a, b) in enumerate(zip(losses, expected, strict=False)) if a != b]
            wrong[step] = (
                f"{len(losses)} of {len(expected)} losses, first difference after {(differs or ['the end'])[0]}"
            )
    assert not wrong, f"resumed after step: {wrong}"


def check_chain(case: Case, directory: Path) -> None:
    """The same for a run that is stopped after every single step."""
    straight, batches, _ = train(case, directory / "straight", seed=1)
    losses: list[float] = []
    resume = None
    for step in case.at or range(1, case.steps + 1):
        part, _, _ = train(case, directory / "chain", 1 if resume is None else 1000 + step, resume, stop_at=step)
        losses += part
        assert losses == straight[: batches[step]], f"step {step}"
        resume = directory / "chain" / f"step={step}"
