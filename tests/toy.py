"""A model, data and a trainer small enough for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nemologger import Trainer
from nemologger.checkpoint import manifest
from nemologger.checkpoint.manifest import Manifest

SAMPLES = 40
BATCH = 4


class ToyData(Dataset[torch.Tensor]):
    """The same numbers each time."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.sin(torch.arange(8, dtype=torch.float32) + index)


class ToyModel(pl.LightningModule):
    """Two layers with a batch norm between them. It starts from the same values each time, and remembers its losses."""

    def __init__(self, width: int = 8, scores: list[float] | None = None, metric: str = "val_loss") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.scores = scores
        self.metric = metric
        self.losses: dict[int, float] = {}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch) - 1).pow(2).mean()
        self.losses[self.global_step] = loss.item()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log(self.metric, (self.net(batch) - 1).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}]


class Scored(ToyModel):
    """Its metric at step ``n`` is ``scores[n - 1]``."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        assert self.scores is not None
        step = max(self.global_step, 1)
        self.log(self.metric, torch.tensor(self.scores[min(step, len(self.scores)) - 1], dtype=torch.float64))


def loader() -> DataLoader[torch.Tensor]:
    """Ten batches, in order."""
    return DataLoader(ToyData(), batch_size=BATCH)


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer that shows nothing, on the CPU."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 5,
        "limit_val_batches": 1,
    }
    return Trainer(**{**settings, **options})


def names(directory: Path) -> list[str]:
    """The entries of ``directory``, sorted."""
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def manifests(directory: Path) -> dict[str, Manifest]:
    """The manifest of every checkpoint in ``directory``, by name."""
    return {path.name: manifest.read(path) for path in sorted(directory.iterdir()) if path.is_dir()}


def losses_of(directory: Path) -> dict[int, str]:
    """The loss of each step that ``train_toy.py`` has written there, the same in every life that took it."""
    losses: dict[int, str] = {}
    for line in (directory / "losses-0.txt").read_text().splitlines():
        step, loss = line.split()
        assert losses.setdefault(int(step), loss) == loss, f"step {step} has two losses"
    return losses


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Those of a checkpoint, or of a part of one, in an order that is always the same."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors_of(value[key])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_of(one)


class ToyDataModule(pl.LightningDataModule):
    """The same batches for training and validation."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return loader()

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return loader()
