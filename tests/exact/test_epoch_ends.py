"""Saves at the last batch of an epoch, and in between gradients that are kept for a later step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exact.runs import BATCH, Case, Net, check, check_chain, shuffled
from exact.test_loaders import Stream
from exact.test_training import EPOCHS
from torch.utils.data import DataLoader

QUIET = {"limit_val_batches": 0}


class EndsEpochs(Net):
    """Changes its weights, and draws, when an epoch ends."""

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.net[0].weight.mul_(0.9)
        torch.rand(2)


class BeginsEpochs(Net):
    """Draws when an epoch begins, and tells its data which one it is."""

    def on_train_epoch_start(self):
        torch.rand(2)
        self.trainer.fit_loop._combined_loader.flattened[0].dataset.epoch = self.current_epoch


class OfEpoch(Stream):
    """Other samples in each epoch, for who tells it the number."""

    epoch = 0

    def __iter__(self):
        return (sample + self.epoch for sample in super().__iter__())


class Anew(pl.LightningDataModule):
    """Has its loaders made anew after some epochs."""

    def train_dataloader(self):
        torch.rand(2)
        return DataLoader(OfEpoch(), batch_size=BATCH, num_workers=1)


class AccumulatesByHand(Net):
    """A step for every four batches, also across the end of an epoch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.batches = False, 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        self.manual_backward(self.note(self.loss(batch)))
        if self.batches % 4 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


def streamed() -> Any:
    return DataLoader(Stream(), batch_size=BATCH)


BY_EPOCH = {"every_n_train_steps": None, "every_n_epochs": 1}
HOOKS = {
    "epochs": Case(shuffled, EndsEpochs, trainer={**EPOCHS, **QUIET}),
    "steps": Case(shuffled, EndsEpochs, trainer=QUIET),
    "both limits": Case(shuffled, EndsEpochs, trainer={**EPOCHS, **QUIET, "max_steps": 18}),
    "every other validated": Case(shuffled, EndsEpochs, trainer={**EPOCHS, "check_val_every_n_epoch": 2}),
    "unsized": Case(streamed, EndsEpochs, trainer={**EPOCHS, **QUIET}),
    "unsized, of its epoch": Case(
        lambda: DataLoader(OfEpoch(), batch_size=BATCH), BeginsEpochs, trainer={**EPOCHS, **QUIET}, at=(6, 7, 12)
    ),
    "unsized, loaded anew": Case(
        Anew, BeginsEpochs, trainer={**EPOCHS, **QUIET, "reload_dataloaders_every_n_epochs": 2}, at=(6, 12)
    ),
    "one batch each": Case(shuffled, EndsEpochs, trainer={**QUIET, "limit_train_batches": 1}),
    "unsized, saved by its validation": Case(streamed, EndsEpochs, trainer=EPOCHS, ckpt=BY_EPOCH, at=(6, 12)),
}
BY_HAND = {
    "accumulated by hand": Case(
        shuffled, AccumulatesByHand, trainer={**EPOCHS, "max_epochs": 4}, ckpt=BY_EPOCH, at=(2, 3), steps=6
    ),
    "accumulated by hand, no validation": Case(
        shuffled, AccumulatesByHand, trainer={**EPOCHS, **QUIET, "max_epochs": 4}, ckpt=BY_EPOCH, at=(2, 3), steps=6
    ),
}


@pytest.mark.parametrize("case", HOOKS.values(), ids=HOOKS)
def test_a_checkpoint_of_the_last_batch_has_what_the_end_of_the_epoch_changes(case, tmp_path):
    check(case, tmp_path)


def test_chain(tmp_path):
    check_chain(HOOKS["steps"], tmp_path)


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND)
def test_no_gradients_are_lost(case, tmp_path):
    check(case, tmp_path)
