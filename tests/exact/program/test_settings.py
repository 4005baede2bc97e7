"""What training sets of Lightning's, torch's and an optimizer's: how often a schedule is stepped, dtypes, defaults."""

from __future__ import annotations

import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train


class SteppedLater(Net):
    """Its schedule is stepped in another rhythm after some steps."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 4:
            self.trainer.lr_scheduler_configs[0].frequency = 2

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.lr_scheduler_configs[0].interval = "epoch"


class ByDefaults(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        return super().step(closure)


class SetsDefaults(Net):
    def configure_optimizers(self):
        return ByDefaults(self.parameters(), lr=1e-2)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 4:
            self.optimizers().optimizer.defaults["lr"] = 1e-3


class InDouble(Net):
    """Draws in another dtype from some step on."""

    def __init__(self):
        torch.set_default_dtype(torch.float32)  # each life begins with that, as in a process of its own
        super().__init__()

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 4:
            torch.set_default_dtype(torch.float64)

    def loss(self, batch):
        return super().loss(batch) * torch.rand(1).float()


@pytest.fixture(autouse=True)
def dtype():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model", [SteppedLater, SetsDefaults, InDouble])
def test_what_is_set_in_mid_training_goes_on(model, tmp_path):
    check(Case(shuffled, model, at=[3, 5, 8]), tmp_path)


class SavesWithinStep(Net):
    def __init__(self, path=None):
        super().__init__()
        self.path = path

    def training_step(self, batch, batch_idx):
        if self.path and self.global_step == 2:
            self.trainer.save_checkpoint(self.path)
        return (self.net(batch.double()) - 1).pow(2).mean()


def test_a_default_dtype_of_a_step_alone_is_not_kept(tmp_path):
    options = {"precision": "64-true", "limit_val_batches": 0}
    train(Case(shuffled, lambda: SavesWithinStep(tmp_path / "within"), steps=3, trainer=options), tmp_path, 1)
    train(Case(shuffled, SavesWithinStep, steps=4, trainer=options), tmp_path / "after", 1, tmp_path / "within")
    assert torch.get_default_dtype() == torch.float32
