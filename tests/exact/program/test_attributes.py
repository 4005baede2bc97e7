"""What modules, data modules and callbacks keep beside parameters and buffers."""

from __future__ import annotations

import importlib
import logging
import random
import sys
import time
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from exact.runs import BATCH, Augmented, Case, Net, check, check_chain, shuffled, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Annealed:
    """An object of the program."""

    def __init__(self):
        self.value, self.rng = 1.0, random.Random(3)

    def next(self):
        self.value *= 0.9
        return self.value + self.rng.random()


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.calls = torch.Generator().manual_seed(5), 0

    def forward(self, batch):
        self.calls += 1
        return batch + self.calls / 100 + torch.rand(batch.shape, generator=self.generator)


class Keeps(Net):
    """Generators, counters and a tensor of its own; one that comes with the epoch; and a list of parameters."""

    def __init__(self):
        super().__init__()
        self.rng, self.annealed, self.noise = np.random.default_rng(1), Annealed(), Noise()
        self.queue = None
        self.weights = list(self.net.parameters())

    def on_train_epoch_start(self):
        self.scale = 1 + self.current_epoch / 10

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.noise(batch)) * (self.rng.random() + self.annealed.next()) * self.scale
        if self.queue is None:
            self.queue, self.late = torch.zeros(3), random.Random(2)
        self.queue = self.queue.roll(1) + loss.item() + self.late.random()
        decay = sum(weight.pow(2).sum() for weight in self.weights)
        return self.note(loss + self.queue.mean() / 100 + decay)


class Data(pl.LightningDataModule):
    """Draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.rng, self.batches = np.random.default_rng(2), 0

    def train_dataloader(self):
        return shuffled()

    def val_dataloader(self):
        return DataLoader(Augmented(), batch_size=BATCH)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.batches += self.trainer.training
        return batch * (1 + self.rng.random() + self.batches / 100)


class DataWithState(Data):
    def state_dict(self):
        return {"seen": self.batches}

    def load_state_dict(self, state):
        self.batches = state["seen"]


class Mixing(pl.Callback):
    """A generator, and a count of this life."""

    def __init__(self):
        self.rng, self.batches = np.random.default_rng(4), 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        batch.mul_(1 + self.rng.random())


STEPS = 0
ARGS = Namespace()


def closure():
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return calls / 50

    return count


def in_file():
    global STEPS
    STEPS += 1
    return STEPS / 50


class Counter:
    calls = 0

    def __call__(self):
        Counter.calls += 1
        return self.calls / 50


class InVariables(Net):
    """Counts in functions that it holds, in a class and in this file; and makes something when it first needs it."""

    count = 0

    def __init__(self):
        super().__init__()
        globals()["STEPS"] = Counter.calls = InVariables.count = 0  # a new process
        self.counts = [closure(), {"a": closure()}["a"], partial(closure()), Counter()]
        self.made, self.table, self.hard = False, None, False

    def training_step(self, batch, batch_idx):
        if not self.made:
            self.table, self.made = (object(),), True
        InVariables.count += 1
        self.hard = self.global_step > 4
        more = sum(count() for count in self.counts) + in_file() + self.count / 70 + self.hard
        return self.note(self.loss(batch + more))


class Args(Net):
    """Counts in the namespaces of its program, in many objects, and in one that it makes when training starts."""

    def __init__(self):
        super().__init__()
        globals()["ARGS"] = Namespace(steps=0)  # a new process
        self.args, self.many = SimpleNamespace(steps=0), [Annealed() for _ in range(40)]

    def on_train_start(self):
        self.late = Annealed()

    def training_step(self, batch, batch_idx):
        ARGS.steps += 1
        self.args.steps += 1
        more = ARGS.steps / 50 + self.args.steps / 70 + self.many[36].next() + self.late.next()
        return self.note(self.loss(batch + more))


class Starts(Net):
    """Sets what it counts with in the hook that starts training, in every life."""

    def __init__(self):
        super().__init__()
        self.count = 5  # what it comes to in a later step

    def on_train_start(self):
        self.count, self.hidden, self.now = 0, None, time.time()
        self.rng = np.random.default_rng(3)
        self.began = self.now

    def training_step(self, batch, batch_idx):
        self.count += 1
        before = torch.zeros(4) if self.hidden is None else self.hidden
        self.hidden = 0.5 * before + batch.mean(0).detach()
        self.now = time.time()
        return self.note(self.loss(batch + self.count / 10 + self.hidden + self.rng.random()))


CASES = {
    "set when training starts": Case(shuffled, Starts, at=[2, 5, 7]),
    "namespaces, many objects": Case(shuffled, Args, at=[2, 7]),
    "variables": Case(shuffled, InVariables, at=[2, 4, 7, 9]),
    "module": Case(shuffled, Keeps),
    "data module": Case(Data),
    "data module with state": Case(DataWithState),
    "callback": Case(shuffled, callbacks=lambda: [Mixing()]),
}


BANK = """
import torch
class Bank(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pointer, self.labels, self.record = 0, torch.zeros(3), []
        self.register_buffer("bank", torch.rand(3), persistent=False)
    def forward(self, loss):
        mean = (self.bank * (1 + self.labels)).mean() * loss
        self.bank[self.pointer], self.labels = loss.item(), self.labels.roll(1) + loss.item() / 9
        self.pointer = (self.pointer + 1) % 3
        self.record.append(mean)
        return mean
"""


@pytest.fixture(params=["of the program", "of a library"])
def bank(request, tmp_path, monkeypatch):
    """A memory bank as self-supervised and metric learning have them; its buffer is in no state dictionary."""
    place = tmp_path / ("site-packages" if request.param == "of a library" else "here")
    place.mkdir()
    (place / "a_memory_bank.py").write_text(BANK)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "a_memory_bank", raising=False)
    return importlib.import_module("a_memory_bank").Bank


def with_bank(bank):
    class Banked(Net):
        def __init__(self):
            super().__init__()
            self.bank = bank()

        def training_step(self, batch, batch_idx):
            return self.note(self.bank(self.loss(batch)))

    return Case(shuffled, Banked, at=[2, 7])


def test_a_memory_bank_that_no_state_dictionary_holds(bank, tmp_path):
    check(with_bank(bank), tmp_path)


def test_parts_of_a_library_that_belong_together(bank, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nemologger.exact.loaders.session.most_of_each", lambda ranks: 20)
    monkeypatch.setattr("nemologger.callbacks.program_state.most_of_each", lambda ranks: 20)
    case = with_bank(bank)
    train(case, tmp_path, 1)
    _, _, trainer = train(case, tmp_path / "again", 2, tmp_path / "step=1", stop_at=2)
    assert trainer.lightning_module.bank.pointer == 1  # not 2: the bank is another one
    assert (
        caplog.text.count("module.bank.bank has changed since training began, and is not saved: it is too large") == 2
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_step(case, tmp_path):
    check(case, tmp_path)


class Tuned(Net):
    """Its hyperparameters change: a number, and one in an object."""

    def __init__(self, alpha=1.0, patience=3, nested=None):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        self.hparams.alpha *= 0.9
        self.hparams.nested.beta += 0.1
        return self.note(self.loss(batch) * self.hparams.alpha * self.hparams.nested.beta)


def test_hyperparameters_that_training_changes_go_on_and_the_others_are_those_of_today(tmp_path):
    check(Case(shuffled, lambda: Tuned(nested=Namespace(beta=1.0)), at=[2, 7]), tmp_path)
    last = []
    case = Case(shuffled, lambda: last.append(Tuned(patience=7, nested=Namespace(beta=1.0))) or last[0], steps=3)
    train(case, tmp_path, 1, tmp_path / "straight/step=2")
    assert last[0].hparams.patience == 7
    assert last[0].hparams.alpha == pytest.approx(0.9**3)


def test_chain(tmp_path):
    check_chain(CASES["module"], tmp_path)


def test_what_the_program_gives_today_stays(tmp_path):
    def made(**attributes):
        model = Keeps()
        vars(model).update(attributes)
        return model

    case = Case(shuffled, made, callbacks=lambda: [Mixing()])
    train(case, tmp_path, 1)
    last = []
    case.model = lambda: last.append(made(patience=7, out="elsewhere")) or last[0]
    _, _, trainer = train(case, tmp_path / "again", 2, tmp_path / "step=5")
    assert (last[0].patience, last[0].out) == (7, "elsewhere")
    assert all(a is b for a, b in zip(last[0].weights, last[0].net.parameters(), strict=True))
    assert next(c for c in trainer.callbacks if type(c) is Mixing).batches == len(last[0].losses)


def test_what_is_set_when_training_starts_goes_on_from_life_to_life_but_for_clocks(tmp_path):
    class Looks(Starts):
        def on_train_batch_start(self, batch, batch_idx):
            assert self.began <= self.now

    check_chain(Case(shuffled, Looks), tmp_path)


def test_a_number_that_is_made_of_itself_in_each_life_is_named(tmp_path, caplog):
    class Halves(Net):
        scale, steps = 1.0, 0

        def on_train_start(self):
            self.scale *= 0.5
            self.steps = self.trainer.max_steps  # the same in each life

    case = Case(shuffled, Halves)
    train(case, tmp_path, 1)
    with caplog.at_level(logging.INFO):
        assert "scale" not in caplog.text
        _, _, trainer = train(case, tmp_path / "again", 2, tmp_path / "step=5")
    assert trainer.lightning_module.scale == 0.25
    told = [record.getMessage() for record in caplog.records if "then changed by a hook" in record.getMessage()]
    assert len(told) == 1
    assert "module.scale was brought back" in told[0]


@pytest.mark.parametrize(("data", "told"), [(Data, 1), (DataWithState, 0)])
@pytest.mark.parametrize("reloads", [0, 1])
def test_what_loaders_that_are_made_again_may_depend_on_is_named(data, told, reloads, tmp_path, caplog):
    train(Case(data, trainer={"reload_dataloaders_every_n_epochs": reloads}, steps=8), tmp_path, 1)
    assert caplog.text.count("attribute data module.batches is brought back when training starts") == told * reloads


def test_an_object_made_when_training_starts_has_what_the_program_gives_today(tmp_path):
    def made(patience):
        class Starts(Net):
            def on_train_start(self):
                self.late = SimpleNamespace(patience=patience, steps=0)

            def training_step(self, batch, batch_idx):
                self.late.steps += 1
                return super().training_step(batch, batch_idx)

        return Starts

    train(Case(shuffled, made(1), steps=5), tmp_path, 1)
    _, _, trainer = train(Case(shuffled, made(7), steps=5), tmp_path / "again", 2, tmp_path / "step=3")
    assert trainer.lightning_module.late == SimpleNamespace(patience=7, steps=5)


def test_odd_attributes_are_no_reason_to_end_training(tmp_path, caplog):
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.args = Namespace(**{"model.steps": 0})  # of --model.steps
            self.tree = {"children": [{}]}
            self.tree["children"][0]["parent"] = self.tree
            with torch.inference_mode():
                self.seen = torch.eye(3).to_sparse()  # as a large tensor of a GPU: it cannot be looked into
            self.states = {weight: Annealed() for weight in self.net.parameters()}

        def on_train_batch_start(self, batch, batch_idx):
            vars(self.args)["model.steps"] += 1

        def training_step(self, batch, batch_idx):
            return self.note(self.loss(batch) * sum(state.next() for state in self.states.values()))

    check(Case(shuffled, Odd, at=[3]), tmp_path)
    assert "module.args.model.steps has changed since training began, and is not saved: it has a name" in caplog.text


def test_what_is_not_kept_is_said_once_by_name(tmp_path, caplog):
    class Objects(Net):
        def on_train_batch_start(self, batch, batch_idx):
            self.seen = (object(),)

    case = Case(shuffled, Objects, steps=5)
    with caplog.at_level(logging.INFO):
        train(case, tmp_path, 1)
    told = {record.getMessage(): record.levelname for record in caplog.records if "attribute" in record.getMessage()}
    assert [*told.values()] == ["WARNING", "INFO"]
    lost, record = told
    assert "module.seen has changed since training began, and is not saved: it holds object objects" in lost
    assert "module.losses is a list that has changed since training began, and is not saved" in record
    again, _, trainer = train(case, tmp_path / "again", 1, tmp_path / "step=3")
    assert len(again) == len(trainer.lightning_module.losses) == 2  # a record of this life


def test_an_object_made_late_is_named_when_it_goes_on_changing(tmp_path, caplog):
    class Late(Net):
        def on_train_batch_start(self, batch, batch_idx):
            self.output = Noise()  # another one each time is no state
            self.output(batch)
            if batch_idx == 1:
                self.late = Annealed()
            if batch_idx > 0:
                self.late.next()

    train(Case(shuffled, Late, steps=5), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "attribute" in record.getMessage()]
    assert len(told) == 1
    assert "module.late has changed since training began, and is not saved: it was made after training began" in told[0]


def test_what_callbacks_count_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(Case(shuffled, steps=5, callbacks=lambda: [Mixing()]), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "callback 0 Mixing" in record.getMessage()]
    assert len(told) == 1
    assert "keeps batches of its own" in told[0]
    assert "state_dict()" in told[0]


def test_data_made_of_other_random_numbers_are_said(tmp_path, caplog):
    class Random(Data):
        def setup(self, stage):
            self.dataset = TensorDataset(torch.rand(22, 4))

        def train_dataloader(self):
            return DataLoader(self.dataset, batch_size=BATCH)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] if isinstance(batch, list) else batch

    case = Case(Random, steps=5)
    train(case, tmp_path, 1)
    train(case, tmp_path / "same", 1, tmp_path / "step=3")
    assert "the training data is not what it was" not in caplog.text
    train(case, tmp_path / "other", 2, tmp_path / "step=3")
    assert "the training data is not what it was" in caplog.text
