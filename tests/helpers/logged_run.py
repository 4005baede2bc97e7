"""A run of a tiny model that a NeMoLogger looks after: what its tests have in common."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nemologger.run.record import close_log


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).mean()
        self.log("loss", loss)
        logging.getLogger("mine").info("batch %d", index)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", self.layer(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(name="make")
def trainers():
    """Makes trainers, and releases the log files of those that never ran."""
    made: list[pl.Trainer] = []

    def trainer(**kwargs) -> pl.Trainer:
        settings = {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        made.append(pl.Trainer(**{**settings, **kwargs}))
        return made[-1]

    yield trainer
    for one in made:
        close_log(one)


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)


def ours() -> list[logging.Handler]:
    return [handler for handler in logging.getLogger().handlers if type(handler).__module__.startswith("nemologger")]
