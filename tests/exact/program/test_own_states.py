"""Objects that are no modules and have a ``state_dict()``, as libraries that average weights have them."""

from __future__ import annotations

import importlib
import logging
import sys

import lightning.pytorch as pl
import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train

AVERAGES = """
import torch
class Averages:
    def __init__(self, parameters):
        self.shadow, self.updates, self.temp = [p.detach().clone() for p in parameters], 0, None
    def step(self, parameters):
        self.updates += 1
        for mean, parameter in zip(self.shadow, parameters):
            mean.lerp_(parameter.detach(), 1 / (1 + self.updates))
    def state_dict(self):
        return {"shadow": self.shadow, "updates": self.updates}
    def load_state_dict(self, state):
        self.shadow, self.updates = list(state["shadow"]), state["updates"]
"""

BUFFER = """
class Order:
    def __init__(self):
        self.left = []
class Buffer:
    def __init__(self):
        self.samples, self.order = [], Order()
    def add(self, sample):
        self.samples.append(sample)
    def sample(self):
        self.order.left = self.order.left or list(range(len(self.samples)))
        return self.samples[self.order.left.pop()]
    def __iter__(self):
        return iter(self.samples)
    def state_dict(self):
        return {"samples": self.samples, "left": self.order.left}
    def load_state_dict(self, state):
        self.samples, self.order.left = list(state["samples"]), list(state["left"])
"""


@pytest.fixture
def buffer(tmp_path, monkeypatch):
    place = tmp_path / "site-packages"
    place.mkdir()
    (place / "some_buffer.py").write_text(BUFFER)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "some_buffer", raising=False)
    return importlib.import_module("some_buffer").Buffer


@pytest.fixture(params=["of the program", "of a library"])
def averages(request, tmp_path, monkeypatch):
    place = tmp_path / ("site-packages" if request.param == "of a library" else "here")
    place.mkdir()
    (place / "some_averages.py").write_text(AVERAGES)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "some_averages", raising=False)
    return importlib.import_module("some_averages").Averages


def in_module(averages):
    """Its losses show the averages, of which there are two: one made when training starts."""

    class Averaged(Net):
        def __init__(self):
            super().__init__()
            self.means = {"first": averages(self.net.parameters())}

        def on_train_start(self):
            self.late = averages(self.net.parameters())

        def training_step(self, batch, batch_idx):
            shown = sum(mean.sum() for mean in [*self.means["first"].shadow, *self.late.shadow])
            return self.note(self.loss(batch) + shown)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            for mean in (self.means["first"], self.late):
                mean.step(self.net.parameters())

    return Case(shuffled, Averaged, at=[7])


def in_callback(averages):
    class Averaging(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.mean = averages(pl_module.net.parameters())

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch.mul_(1 + sum(mean.mean() for mean in self.mean.shadow))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.mean.step(pl_module.net.parameters())

    return Case(shuffled, callbacks=lambda: [Averaging()], at=[7])


@pytest.mark.parametrize("where", [in_module, in_callback])
def test_averages_go_on_as_they_were(averages, where, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        check(where(averages), tmp_path)
    assert "shadow" not in caplog.text  # none of them is said to be lost


def test_what_is_too_large_is_named_once_with_what_to_do(averages, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nemologger.callbacks.program_state.most_of_each", lambda ranks: 300)
    case = in_module(averages)
    with caplog.at_level(logging.INFO):
        train(case, tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "module.late" in record.getMessage()]
    assert len(told) == 1
    assert (
        "module.late has a state_dict() and has changed since training began, and is not saved: it is too large"
        in told[0]
    )
    assert "on_save_checkpoint()" in told[0]
    assert "module.means" not in caplog.text  # that one was kept


def test_a_state_that_does_not_fit_is_named_and_training_goes_on(tmp_path, caplog):
    class Fickle:
        def __init__(self, size):
            self.value = torch.zeros(size)

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value.copy_(state["value"])

    def with_size(size):
        model = Net()
        model.fickle = Fickle(size)
        return model

    train(Case(shuffled, lambda: with_size(2), steps=2), tmp_path, 1)
    train(Case(shuffled, lambda: with_size(3), steps=3), tmp_path / "other", 1, tmp_path / "step=1")
    assert "module.fickle was saved, and begins as the program makes it: its load_state_dict() raises" in caplog.text
    losses, _, _ = train(Case(shuffled, Net, steps=3), tmp_path / "without", 1, tmp_path / "step=1")
    assert len(losses) == 2
    assert "there is no such object when training starts" in caplog.text


class KeepsItsOwn(Net):
    """Trains a part with an optimizer, a schedule and a scaler that it shows to nobody."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.head = torch.nn.Linear(1, 1)
        self.own = torch.optim.Adam(self.head.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.own, [3, 9], 0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=5)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        self.warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)  # in what it returns, too
        later = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, [self.warm, later], [5])]

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch) + (self.head(torch.ones(1)) - 1).pow(2).sum() * self.schedule.get_last_lr()[0] * 100
        self.optimizers().zero_grad()
        self.own.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizers().optimizer)
        self.scaler.step(self.own)
        self.scaler.update()
        self.optimizers().step()
        self.schedule.step()
        self.lr_schedulers().step()
        return self.note(loss * self.scaler.get_scale())


def test_optimizers_that_the_trainer_does_not_know_go_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check(Case(shuffled, KeepsItsOwn, at=[7, 12]), tmp_path)
    assert "own" not in caplog.text
    assert "warm" not in caplog.text


def test_a_buffer_of_samples_that_can_be_gone_through_goes_on(buffer, tmp_path):
    """As torchrl's ReplayBuffer, whose sampler takes each sample once in a round."""

    class Replays(Net):
        def __init__(self):
            super().__init__()
            self.buffer = buffer()

        def training_step(self, batch, batch_idx):
            self.buffer.add(batch.mean().item())
            return self.note(self.loss(batch) + self.buffer.sample())

    check(Case(shuffled, Replays, at=[3, 7]), tmp_path)
