"""Every way of training that changes when batches are taken or random numbers are drawn."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exact.loaders.test_loaders import FlaggedStream, SizedFlagged, Stream
from exact.runs import BATCH, Augmented, Case, Net, check, shuffled
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

EPOCHS = {"max_epochs": 3, "max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}


class TwoOptimizers(Net):
    """Manual optimization, every batch both optimizers; a step each counts."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.note(loss)

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.net[0].parameters(), lr=1e-2),
            torch.optim.SGD(self.net[2].parameters(), lr=1e-2, momentum=0.9),
        ]


class SumsUp(TwoOptimizers):
    """One of the optimizers takes a step of the gradients of three batches, the other in each."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        first, second = self.optimizers()
        for optimizer in [second] if batch_idx % 3 else [first, second]:
            optimizer.step()
            optimizer.zero_grad()
        self.note(loss)


class LeavesZeros(Net):
    """Momentum moves the parameters of a batch that does not use them: their gradients are there, and zero."""

    def training_step(self, batch, batch_idx):
        return self.note(self.loss(batch) if batch_idx % 3 == 0 else self.net[2](batch.repeat(1, 2)).pow(2).mean())

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class Schedules(Net):
    """A schedule for as many steps as the trainer estimates, for which it makes the loaders early."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ByEpoch(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.3), "interval": "epoch"}]


class Plateau(Net):
    """A schedule that waits for a metric."""

    interval = "epoch"

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0)
        config = {"scheduler": schedule, "monitor": "val_loss", "interval": self.interval, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


class PlateauByStep(Plateau):
    interval = "step"


class Hooks(Net):
    """Draws in hooks around batches and epochs."""

    def on_train_epoch_start(self):
        torch.rand(3)

    def on_train_batch_start(self, batch, batch_idx):
        torch.rand(2)

    def on_train_start(self):
        torch.rand(7)


class PullsItself(Net):
    """Takes its batches from the iterator."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.note(self.loss(batch))


class Finds(Net):
    def __init__(self):
        super().__init__()
        self.lr = 1e-2

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class FindEachTime(pl.callbacks.LearningRateFinder):
    """Tries learning rates before training, and again when the run is resumed, which puts other state in the way of it."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        pl_module.losses.clear()


class EndsSoon(Net):
    """Leaves the second epoch after its third batch; the steps are the same as of batches that are not trained on."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.trainer.current_epoch == 1 and batch_idx == 3 else None


def some_missing(samples):
    """No batch, where a program finds its samples unfit."""
    batch = torch.stack(samples)
    return None if batch[0, 0] > 1.9 else batch


class Scaled(MixedPrecision):
    """Half precision on the CPU, with a scaler."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3))


class Precise(Net):
    """Takes batches in the precision of its weights."""

    def loss(self, batch):
        return (self.net(batch.to(self.net[0].weight.dtype)) - 1).pow(2).mean()


class Exact(torch.optim.Optimizer):
    """Keeps weights in 32 bits, of which the parameters have what fits."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            weight = self.state[parameter].setdefault("weight", parameter.detach().float().clone())
            parameter.copy_(weight.sub_(parameter.grad.float(), alpha=1e-3))


class KeepsDigits(Precise):
    def configure_optimizers(self):
        return Exact(self.parameters())


class Untrained(Net):
    """Only looks at its batches."""

    def configure_optimizers(self):
        return None


class Late(SingleDeviceStrategy):
    """Restores a checkpoint after the optimizers, as sharding strategies do."""

    restore_checkpoint_after_setup = True


class Reloaded(pl.LightningDataModule):
    """Another dataset in each epoch."""

    def train_dataloader(self):
        return DataLoader(Augmented(22 - self.trainer.current_epoch), batch_size=BATCH, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Augmented(), batch_size=BATCH)


class Unvalidated(pl.LightningDataModule):
    """Says in the usual way that there is nothing to validate with."""

    def train_dataloader(self):
        return shuffled()

    def val_dataloader(self):
        return []


class ReloadedEveryOther(Reloaded):
    def train_dataloader(self):
        return DataLoader(Augmented(22 - self.trainer.current_epoch // 2), batch_size=BATCH, shuffle=True)


class Same(Reloaded):
    """The same loader, whenever it is asked for."""

    def __init__(self):
        super().__init__()
        self.loader = shuffled()

    def train_dataloader(self):
        return self.loader


LATE: dict[str, Any] = {"strategy": Late("cpu"), "accelerator": "auto"}

CASES: dict[str, Case] = {
    "epochs": Case(shuffled, trainer=EPOCHS),
    "no validation": Case(shuffled, trainer={"limit_val_batches": 0}),
    "no validation data": Case(Unvalidated, at=(3, 4, 6, 9)),
    "no validation data, asked for late": Case(
        Unvalidated,
        trainer={**EPOCHS, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0},
        at=(11, 12, 13),
    ),
    "no validation, unsized": Case(lambda: DataLoader(Stream(), batch_size=BATCH), trainer={"limit_val_batches": 0}),
    "unsized, epochs": Case(
        lambda: DataLoader(Stream(), batch_size=BATCH), trainer={**EPOCHS, "num_sanity_val_steps": 0}
    ),
    "val every epoch and a half": Case(shuffled, trainer={"val_check_interval": 9}),
    "val in the middle": Case(shuffled, trainer={**EPOCHS, "val_check_interval": 0.5}),
    "accumulate": Case(shuffled, trainer={"accumulate_grad_batches": 2}, steps=8),
    "accumulate unevenly": Case(shuffled, trainer={"accumulate_grad_batches": 4, **EPOCHS}, steps=6),
    "limit": Case(shuffled, trainer={"limit_train_batches": 4}),
    "limit, unsized": Case(lambda: DataLoader(Stream(), batch_size=BATCH), trainer={"limit_train_batches": 4}),
    "limit, state": Case(lambda: DataLoader(SizedFlagged(), batch_size=BATCH), trainer={"limit_train_batches": 4}),
    "gradients that wait": Case(shuffled, SumsUp, trainer={"limit_val_batches": 0}, steps=20, at=[4, 7]),
    "gradients that are zero": Case(shuffled, LeavesZeros, at=[3, 4]),
    "two optimizers": Case(shuffled, TwoOptimizers, steps=26, at=range(2, 26, 2), ckpt={"every_n_train_steps": 2}),
    "estimated steps": Case(shuffled, Schedules),
    "estimated steps, epochs": Case(shuffled, Schedules, trainer=EPOCHS),
    "estimated steps, unsized": Case(lambda: DataLoader(Stream(), batch_size=BATCH), Schedules),
    "restored late": Case(shuffled, Schedules, trainer=LATE),
    "restored late, unsized": Case(
        lambda: DataLoader(Stream(), batch_size=BATCH),
        Schedules,
        trainer=LATE,
    ),
    "restored late, unsized, state": Case(
        lambda: DataLoader(FlaggedStream(), batch_size=BATCH),
        Schedules,
        trainer=LATE,
    ),
    "schedule by epoch": Case(shuffled, ByEpoch),
    "schedule by epoch, epochs": Case(shuffled, ByEpoch, trainer=EPOCHS),
    "plateau": Case(shuffled, Plateau),
    "plateau, epochs": Case(shuffled, Plateau, trainer=EPOCHS),
    "plateau, no validation at the end": Case(shuffled, Plateau, trainer={"val_check_interval": 5}, steps=20),
    "plateau by step": Case(shuffled, PlateauByStep),
    "hooks": Case(shuffled, Hooks),
    "pulls itself": Case(shuffled, PullsItself),
    "half precision": Case(shuffled, trainer={"plugins": [Scaled()]}),
    "bf16": Case(shuffled, trainer={"precision": "bf16-mixed"}),
    "double precision": Case(shuffled, Precise, trainer={"precision": "64-true"}, at=(2, 9)),
    "optimizer with more digits": Case(shuffled, KeepsDigits, trainer={"precision": "bf16-true"}, at=(2, 9)),
    "no optimizer": Case(shuffled, Untrained, at=(2, 9)),
    "reloaded": Case(Reloaded, trainer={**EPOCHS, "reload_dataloaders_every_n_epochs": 1}),
    "reloaded every other": Case(
        ReloadedEveryOther, trainer={**EPOCHS, "max_epochs": 4, "reload_dataloaders_every_n_epochs": 2}
    ),
    "reloaded, estimated steps, unsized": Case(
        lambda: DataLoader(Stream(), batch_size=BATCH),
        Schedules,
        trainer={**EPOCHS, "max_steps": 14, "reload_dataloaders_every_n_epochs": 1},
        at=(4, 6, 9),
    ),
    "reloaded the same": Case(Same, trainer={**EPOCHS, "reload_dataloaders_every_n_epochs": 1}),
    "overfit": Case(shuffled, trainer={"overfit_batches": 3}),
    "unsized, state, no validation": Case(
        lambda: DataLoader(FlaggedStream(), batch_size=BATCH), trainer={"limit_val_batches": 0}
    ),
    "learning rate finder": Case(
        shuffled,
        Finds,
        trainer={"max_steps": 40},
        callbacks=lambda: [FindEachTime(num_training_steps=4)],
        at=(5, 6, 7),
        steps=40,
    ),
    "an epoch that a hook ends": Case(shuffled, EndsSoon, trainer=EPOCHS, at=(6, 10, 13)),
    "batches that are None": Case(lambda: shuffled(collate_fn=some_missing), at=(3, 7, 11)),
    "saved at epoch ends": Case(
        shuffled, trainer=EPOCHS, ckpt={"every_n_train_steps": None, "every_n_epochs": 1}, at=(6, 12)
    ),
    "saved after epoch ends, by steps": Case(
        shuffled, ckpt={"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True}, at=(6, 12)
    ),
    "saved after epoch ends, plateau by step": Case(
        shuffled,
        PlateauByStep,
        ckpt={"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True},
        at=(6, 12),
    ),
    "saved after epoch ends, both limits": Case(
        shuffled,
        ByEpoch,
        trainer={**EPOCHS, "max_steps": 18},
        ckpt={"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True},
        at=(6, 12),
    ),
    "saved after epoch ends, both limits, no validation": Case(
        shuffled,
        Schedules,
        trainer={**EPOCHS, "max_steps": 18, "limit_val_batches": 0},
        ckpt={"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True},
        at=(6, 12),
    ),
    "both limits": Case(shuffled, Schedules, trainer={**EPOCHS, "max_steps": 18}),
    "saved after epoch ends": Case(
        shuffled,
        trainer=EPOCHS,
        ckpt={"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True},
        at=(6, 12),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_step(case: Any, tmp_path):
    check(case, tmp_path)
