"""Saves at the last batch of an epoch, and in between gradients that are kept for a later step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exact.loaders.test_loaders import FlaggedStream, StatefulStream, Stream, generator_loader, of
from exact.runs import BATCH, Augmented, Case, Net, check, check_chain, shuffled
from exact.test_training import EPOCHS
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

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


class EndsEarly(StatefulStream):
    """Has fewer samples than it says; its state is that of the next pass when that shows."""

    def __len__(self):
        return self.samples + 2 * BATCH


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
EARLY = {
    "before its length": Case(lambda: of(EndsEarly()), at=(6, 12)),
    "before its length, torchdata": Case(lambda: StatefulDataLoader(EndsEarly(), batch_size=BATCH), at=(6, 12)),
    "before a limit": Case(lambda: of(StatefulStream()), trainer={"limit_train_batches": 4}, at=(4, 6)),
    "before a longer one": Case(
        lambda: CombinedLoader([of(Stream()), of(Augmented(44), shuffle=True, generator=torch.Generator())], "min_size"),
        at=(6, 7, 12),
    ),
    "before others go on": Case(
        lambda: CombinedLoader([of(FlaggedStream(10)), generator_loader(), of(Augmented(30))], "max_size"),
        at=(3, 4, 7),
    ),
    "before unsized ones": Case(
        lambda: CombinedLoader([generator_loader(), of(Stream(36))], "max_size"), at=(6, 8)
    ),
    "that begin anew, of whole batches": Case(
        lambda: CombinedLoader([of(Augmented(8), shuffle=True), of(StatefulStream(40))], "max_size_cycle"), at=(4, 6)
    ),
}  # fmt: skip
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


@pytest.mark.parametrize("case", EARLY.values(), ids=EARLY)
def test_loaders_that_end_early(case, tmp_path):
    check(case, tmp_path)


CHAINS = {"steps": HOOKS["steps"], "early": Case(lambda: of(EndsEarly()))}


@pytest.mark.parametrize("case", CHAINS.values(), ids=CHAINS)
def test_chain(case, tmp_path):
    check_chain(case, tmp_path)


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND)
def test_no_gradients_are_lost(case, tmp_path):
    check(case, tmp_path)
