"""What the program gives its optimizers and schedules, and a checkpoint takes the place of."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR, SequentialLR
from toy import ToyModel, loader, quiet_trainer

from nemologger import ModelCheckpoint


class _Made(ToyModel):
    """Has the optimizer and the schedules that ``make`` returns; moves some of the numbers while it trains."""

    def configure_optimizers(self):
        optimizer, *schedules = self.make(self)
        return [optimizer], [{"scheduler": one, "interval": "step"} for one in schedules]

    def on_train_batch_start(self, batch, batch_idx):
        for group in self.optimizers().param_groups:
            group["weight_decay"] += 1e-3


def _adam(module, **options):
    return torch.optim.AdamW(module.net.parameters(), **{"lr": 0.01, **options})


def _alone(**options):
    return lambda module: [_adam(module, **options)]


def _in_groups(second):
    def make(module):
        first, *_, last = module.net
        return [
            torch.optim.AdamW([{"params": first.parameters()}, {"params": last.parameters(), "lr": second}], lr=0.1)
        ]

    return make


def _cosine(lr=0.01, t_max=9, at=2):
    def make(module):
        optimizer = _adam(module, lr=lr)
        parts = [LinearLR(optimizer, 0.1, total_iters=at), CosineAnnealingLR(optimizer, t_max)]
        return [optimizer, SequentialLR(optimizer, parts, [at]), MultiStepLR(optimizer, [at, 7])]

    return make


def _one_cycle(module):
    optimizer = _adam(module, lr=torch.tensor(0.01))
    return [optimizer, OneCycleLR(optimizer, 0.1, 30)]


def _lives(directory, *makes, callbacks=list):
    """A run with the first of ``makes``, and one after the other that goes on with it."""
    path = None
    for life, make in enumerate(makes, 1):
        saves = ModelCheckpoint(dirpath=directory / str(life), filename="x", monitor=None, every_n_train_steps=2)
        trainer = quiet_trainer(max_steps=2 * life, callbacks=[*callbacks(), saves], limit_val_batches=0)
        model = _Made()
        model.make = make  # no hyperparameter: it would be in the checkpoint
        trainer.fit(model, loader(), ckpt_path=path)
        path = str(directory / str(life) / "x")


def _told(caplog):
    told = [record.getMessage() for record in caplog.records]
    return [text for text in told if re.match("exact resume, (optimizer|schedule)", text)]


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (_alone(), _alone(lr=0.5), ["optimizer 0 .*: lr 0.01 (0.5 here)."]),
        (_alone(), _alone(betas=(0.5, 0.999)), ["optimizer 0 .*: betas [0.9, 0.999] ([0.5, 0.999] here)."]),
        (_alone(), _alone(weight_decay=0.0), ["optimizer 0 .*: weight_decay 0.01 (0.0 here)."]),
        (_in_groups(0.2), _in_groups(0.3), ["optimizer 0 .*: group 1: lr 0.2 (0.3 here)."]),
        (_cosine(), _cosine(lr=0.02), ["optimizer 0 .*: initial_lr 0.01 (0.02 here)."]),
        (_cosine(), _cosine(t_max=8), ["schedule 0 (SequentialLR) .*: _schedulers.1.T_max 9 (8 here)."]),
        (
            _cosine(),
            _cosine(at=3),
            [
                "schedule 0 (SequentialLR) .*: _milestones [2] ([3] here), _schedulers.0.total_iters 2 (3 here).",
                "schedule 1 (MultiStepLR) .*: milestones [2, 7, 1, 1] ([3, 7, 1, 1] here).",
            ],
        ),
    ],
    ids=["lr", "betas", "weight decay", "groups", "lr of a schedule", "T_max", "milestones"],
)
def test_what_the_program_changes_in_vain_is_named(tmp_path, caplog, first, then, said):
    _lives(tmp_path, first, then)
    told = _told(caplog)
    assert len(told) == len(said)
    for text, wanted in zip(told, said, strict=True):
        begin, end = wanted.split(".*")
        assert text.startswith(f"exact resume, {begin}")
        assert end in text


def test_it_is_named_in_each_life_until_the_program_has_it_again(tmp_path, caplog):
    _lives(tmp_path, _alone(), _alone(lr=0.5), _alone(lr=0.5), _alone())
    assert ["lr 0.01 (0.5 here)" in text for text in _told(caplog)] == [True, True]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (_alone(), _alone()),
        (_cosine(), _cosine()),
        (_one_cycle, _one_cycle),
        (_alone(), _one_cycle),
        (_one_cycle, _alone()),
    ],
    ids=["no schedule", "schedules", "one that sets the rate", "one that is new", "one that is gone"],
)
def test_nothing_is_said_of_what_the_program_makes_alike_and_training_moves(tmp_path, caplog, first, then):
    _lives(tmp_path, first, then, callbacks=lambda: [LearningRateFinder(num_training_steps=3, update_attr=False)])
    assert not _told(caplog)
