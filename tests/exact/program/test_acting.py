"""Callbacks that change training by what they count, and those that only tell of it."""

from __future__ import annotations

import copy
import logging
import time

import pytest
import torch
from exact.runs import Case, Net, shuffled, train
from lightning.pytorch.callbacks import Callback

from nemologger.exact.program.acting import acts_by
from nemologger.exact.program.attributes import Attributes


class Counts(Callback):
    """Counts batches."""

    def __init__(self, given=None):
        self.count, self.best, self.stats, self.losses = 0, 9.0, {}, []
        self.given: object = given

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        self.act(trainer, pl_module, outputs)

    def act(self, trainer, pl_module, outputs):
        raise NotImplementedError


class Sets(Counts):
    def act(self, trainer, pl_module, outputs):
        pl_module.weight = 1 / self.count


class SetsLater(Counts):
    def act(self, trainer, pl_module, outputs):
        if self.count % 3:
            return
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= 0.5


class SetsByAName(Counts):
    def act(self, trainer, pl_module, outputs):
        late = self.count > 10
        if late:
            pl_module.net[0].requires_grad_(False)


class SetsInPlace(Counts):
    def act(self, trainer, pl_module, outputs):
        with torch.no_grad():
            for parameter, _ in zip(pl_module.parameters(), range(9), strict=False):
                parameter.mul_(1 - 0.1**self.count)


class SetsByAMethod(Counts):
    def act(self, trainer, pl_module, outputs):
        if self.count == 10:
            self._change(trainer)

    def _change(self, trainer):
        trainer.gradient_clip_val = 0.1


def change(optimizers):
    optimizers[0].param_groups[0]["lr"] = 0.1


class SetsByAFunction(Counts):
    def act(self, trainer, pl_module, outputs):
        while self.count > 5 and pl_module.training:
            change(trainer.optimizers)


class CallsASetter(Counts):
    def act(self, trainer, pl_module, outputs):
        if self.count > 5:
            pl_module.next_stage()


class SetsWhatItWasGiven(Counts):
    def act(self, trainer, pl_module, outputs):
        self.given.difficulty = self.count / 10


class SetsWhatItKeeps(Counts):
    def on_fit_start(self, trainer, pl_module):
        self.optimizer = trainer.optimizers[0]

    def act(self, trainer, pl_module, outputs):
        setattr(self.optimizer, "decay", self.count)  # noqa: B010


class SetsLaterWhatItSets(Counts):
    def on_train_epoch_start(self, trainer, pl_module):
        self.count = trainer.current_epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.weight = self.count


class SetsByItself(Counts):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        before = self.count
        self.count = before + trainer.global_step
        pl_module.weight = self.count


ACTING = [
    Sets, SetsLater, SetsByAName, SetsInPlace, SetsByAMethod, SetsByAFunction, CallsASetter, SetsWhatItWasGiven,
    SetsWhatItKeeps, SetsLaterWhatItSets, SetsByItself,
]  # fmt: skip


class SetsByTheStep(Counts):
    begin = 1.0

    def __init__(self, given=None):
        super().__init__(given)
        self.total = 100

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count = max(0, 1 - trainer.global_step / self.total)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.count


class Prints(Counts):
    def act(self, trainer, pl_module, outputs):
        if self.count % 10 == 0:
            print(self.count, trainer.callback_metrics)
            pl_module.log("count", self.count)
            trainer.logger.experiment.config["count"] = self.count


class PrintsBesideASchedule(Counts):
    def act(self, trainer, pl_module, outputs):
        if self.count % 10 == 0:
            print(self.count)
        pl_module.weight = trainer.global_step / 10


class Stops(Counts):
    def act(self, trainer, pl_module, outputs):
        if self.count == 10:
            trainer.should_stop = True


class Times(Counts):
    def act(self, trainer, pl_module, outputs):
        took = time.time() - self.best
        self.stats["took"] = took / self.count
        logs = {"took": took}
        logs["speed"] = self.count / took
        pl_module.log_dict(logs)
        outputs["count"] = self.count
        self.best = time.time()


class KeepsTheBest(Counts):
    def act(self, trainer, pl_module, outputs):
        loss = pl_module.last_loss
        if loss < self.best:
            self.best, self.stats = loss, copy.deepcopy(pl_module.state_dict())
            self.count = 0
            trainer.save_checkpoint(f"{self.best}.ckpt")


class Samples(Counts):
    def act(self, trainer, pl_module, outputs):
        if self.count % 100 == 0:
            pl_module.eval()
            self.losses.append(pl_module(torch.ones(1)))
            pl_module.log_picture(self.losses)
            pl_module.train()
            trainer.progress_bar_callback.main_progress_bar.set_postfix(n=self.count)


class AtTheEnd(Counts):
    def act(self, trainer, pl_module, outputs):
        self.losses.append(outputs["loss"])

    def on_train_end(self, trainer, pl_module):
        pl_module.losses = self.losses[: self.count]


TELLING = [SetsByTheStep, Prints, PrintsBesideASchedule, Stops, Times, KeepsTheBest, Samples, AtTheEnd]


class Staged(Net):
    def next_stage(self):
        self.stage = 1

    def log_picture(self, losses):
        self.picture = losses


@pytest.mark.parametrize("kind", ACTING + TELLING)
def test_a_callback_acts_by_what_it_counts_or_tells_of_it(kind):
    assert acts_by(kind(Staged()), Staged(), ["count", "best", "stats.took"]) == ["count"] * (kind in ACTING)


def test_only_one_that_acts_is_named_by_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(Case(shuffled, Staged, steps=3, callbacks=lambda: [SetsLater(), Stops()]), tmp_path, 1)
    told = [record for record in caplog.records if "keeps count of its own" in record.message]
    assert [record.levelname for record in told] == ["WARNING", "INFO"]
    assert "callback 0 SetsLater" in told[0].message


def test_one_that_only_tells_is_looked_through_once_at_each_save(tmp_path, monkeypatch):
    looks, changed = [], Attributes.changed
    monkeypatch.setattr(Attributes, "changed", lambda self: looks.append(1) or changed(self))
    train(Case(shuffled, Staged, steps=3, callbacks=lambda: [Prints()]), tmp_path, 1)
    assert len(looks) == 3


def test_of_a_callback_without_a_source_nobody_can_say_that_it_only_tells():
    space = {"Callback": Callback, "__name__": "a_configuration"}
    code = (
        "class Counts(Callback):\n"
        " def __init__(self): self.n = self.m = 0\n"
        " def on_train_batch_end(self, trainer, module, *given): self.n += 1; print(self.n)\n"
    )
    exec(code, space)
    assert acts_by(space["Counts"](), Net(), ["n", "m"]) == ["n"]
