"""Runs that would be without a checkpoint until they end: it is said before, or there is one."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from toy import Scored, ToyModel, loader, names, quiet_trainer

from nemologger import ModelCheckpoint
from nemologger.saving.first_save import why_seldom_saved

INF = float("inf")
SELDOM = "has nothing to go on from"
NO_LIMIT = {"max_epochs": -1, "max_steps": -1}
VALIDATES = {"max_steps": -1, "epoch": 9, "validates": True}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        # an end of training at which a save is due
        ({"every_n_epochs": 1, "max_epochs": 1, "max_steps": -1, "epoch": 10}, ""),
        ({"every_n_epochs": 1, "max_epochs": 9, "max_steps": 10, "epoch": 10}, ""),
        ({"every_n_train_steps": 10, "max_epochs": -1, "max_steps": 10, "epoch": INF}, ""),
        # before the first one
        ({"every_n_epochs": 1, "max_epochs": -1, "max_steps": 9, "epoch": 10}, "after 10 steps"),
        ({"every_n_epochs": 4, "max_epochs": 3, "max_steps": -1, "epoch": 10}, "after 40 steps"),
        ({"every_n_train_steps": 11, "max_epochs": 1, "max_steps": -1, "epoch": 10}, "ends after 10 steps"),
        ({"every_n_train_steps": 5, "max_epochs": 1, "max_steps": -1, "epoch": 10, "accumulate_grad_batches": 2}, ""),
        ({"every_n_train_steps": 6, "max_epochs": 1, "max_steps": -1, "epoch": 10, "accumulate_grad_batches": 2}, "5 steps"),
        # data of which nobody knows the length
        ({"every_n_epochs": 1, "max_epochs": -1, "max_steps": 10, "epoch": INF}, "length is not known"),
        ({"every_n_epochs": 1, **NO_LIMIT, "epoch": INF, "validates": True}, "length is not known"),
        ({"every_n_epochs": 1, "max_epochs": 2, "max_steps": 10, "epoch": INF}, ""),
        ({"every_n_epochs": 1, **NO_LIMIT, "epoch": INF, "validates": True, "val_check_batch": 7}, ""),
        ({"every_n_epochs": 2, **NO_LIMIT, "epoch": INF, "validates": True, "val_check_batch": 7}, "length is not known"),
        ({"every_n_train_steps": 10, **NO_LIMIT, "epoch": INF}, ""),
        # validations
        ({"every_n_epochs": 1, "max_epochs": 1, "max_steps": 5, "epoch": 9, "validates": True, "val_check_batch": 5}, ""),
        ({"every_n_epochs": 1, "max_epochs": 5, **VALIDATES, "check_val_every_n_epoch": 5}, ""),
        (
            {"every_n_epochs": 3, "max_epochs": 5, **VALIDATES, "check_val_every_n_epoch": 2},
            "after 54 steps",
        ),
        (
            {"every_n_epochs": 3, "max_epochs": 6, **VALIDATES, "check_val_every_n_epoch": 2},
            "only every 6th epoch",
        ),
        (
            {
                "every_n_epochs": 1, "max_epochs": 5, **VALIDATES,
                "check_val_every_n_epoch": None, "val_check_batch": 46,
            },
            "after 46 steps",
        ),
        # nothing is asked for, or nothing trained
        ({"max_epochs": 3, "max_steps": -1, "epoch": 10}, ""),
        ({"every_n_epochs": 1, "max_epochs": 0, "max_steps": -1, "epoch": 10}, ""),
        ({"every_n_epochs": 1, "max_epochs": 3, "max_steps": -1, "epoch": 0}, ""),
    ],
)  # fmt: skip
def test_what_is_due_too_late(settings, why):
    found = why_seldom_saved(**settings)
    assert why in found if why else found is None


class Stream(IterableDataset):
    """So many samples, of which it may say that there are more."""

    def __init__(self, samples: int, batches: float = INF) -> None:
        self.samples, self.batches = samples, batches

    def __iter__(self):
        return (torch.full((8,), float(n)) for n in range(self.samples))


class Sized(Stream):
    def __len__(self):
        return int(self.batches)


def said(caplog, directory, data=None, ckpts=({},), **trainer):
    savers = [
        ModelCheckpoint(dirpath=directory, monitor=None, filename=f"{n}-{{step}}", **one) for n, one in enumerate(ckpts)
    ]
    trainer = quiet_trainer(**{"check_val_every_n_epoch": 1, "val_check_interval": 1.0, **trainer}, callbacks=savers)
    with caplog.at_level(logging.WARNING):
        trainer.fit(ToyModel(), DataLoader(Stream(10**9), batch_size=4) if data is None else data, loader())
    return [message for message in caplog.messages if SELDOM in message]


def test_a_stream_without_end_is_told_before_training(tmp_path, caplog):
    (message,) = said(caplog, tmp_path, max_steps=6)
    assert "every_n_epochs=1, and no epoch ends" in message
    assert "set every_n_train_steps" in message
    assert names(tmp_path)  # when training ends there is one


@pytest.mark.parametrize(
    "ckpts",
    [
        [{"every_n_train_steps": 3}],
        [{"train_time_interval": timedelta(hours=1)}],
        [{}, {"every_n_train_steps": 6}],  # one is enough
    ],
)
def test_a_stream_that_is_saved_is_nothing_to_tell(tmp_path, caplog, ckpts):
    assert not said(caplog, tmp_path, ckpts=ckpts, max_steps=6)


def test_an_ordinary_run_is_told_nothing(tmp_path, caplog):
    assert not said(caplog, tmp_path, data=loader(), max_epochs=1)


@pytest.mark.parametrize(
    ("data", "options"),
    [(Sized(24, 40), {}), (Stream(24), {"val_check_interval": 7})],
    ids=["says that it is longer", "ends before val_check_interval"],
)
def test_epochs_that_end_before_their_validation_are_saved(tmp_path, caplog, data, options):
    said(
        caplog,
        tmp_path,
        DataLoader(data, batch_size=4),
        [{"save_top_k": -1, "save_last": False}],
        max_epochs=3,
        **options,
    )
    assert names(tmp_path) == ["0-step=12", "0-step=18", "0-step=6"]
    assert len([message for message in caplog.messages if "epoch 0 has ended before its validation" in message]) == 1


@pytest.mark.parametrize(
    ("scores", "ckpts", "told"),
    [
        ([INF - INF], [{"save_last": False}], True),  # NaN
        ([1.0, 2.0], [{"save_last": False}], True),
        ([4.0, 3.0, 2.0, 1.0], [{"save_last": False}], False),
        ([1.0, 2.0], [{"save_last": True}], False),
        ([1.0, 2.0], [{"save_last": False}, {"monitor": None}], False),  # which keeps the newest
    ],
)
def test_what_is_no_longer_saved_is_told_once(tmp_path, caplog, scores, ckpts, told):
    settings = {"dirpath": tmp_path, "every_n_train_steps": 1, "save_top_k": 1}
    savers = [ModelCheckpoint(filename=f"{n}-{{step}}", **settings, **one) for n, one in enumerate(ckpts)]
    quiet_trainer(max_steps=4, val_check_interval=1, callbacks=savers).fit(Scored(scores=scores), loader(), loader())
    messages = [message for message in caplog.messages if "with save_last=False nothing else is" in message]
    assert len(messages) == told
    assert not told or f"goes on from {tmp_path}/0-step=1;" in messages[0]
