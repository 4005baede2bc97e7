"""Values among attributes that are neither numbers, texts nor lists; and long lists of objects that are made late."""

from __future__ import annotations

from array import array
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import torch
from exact.runs import BATCH, Augmented, Case, Net, check, check_chain, shuffled, train
from torch.utils.data import DataLoader


class Steps(int):
    def next(self):
        return Steps(self + 1)


class Values:
    """One of each kind; every step changes all of them."""

    def __init__(self):
        self.phase, self.share, self.price = 1 + 0j, Fraction(1), Decimal(1)
        self.seen, self.window, self.part, self.shape = b"", range(1), slice(0, 1), torch.Size([1])
        self.at, self.passed, self.place = datetime(2020, 1, 1, tzinfo=UTC), timedelta(0), Path("a")
        self.dtype, self.row, self.late = torch.float32, array("d", [1.0]), None
        self.steps = Steps(0)

    def next(self):
        self.phase *= 0.9 + 0.1j
        self.share *= Fraction(9, 10)
        self.price *= Decimal("0.9")
        self.seen += b"a"
        self.window, self.part = range(len(self.window) + 1), slice(0, self.part.stop + 1)
        self.shape = torch.Size([self.shape[0] + 1])
        self.at += timedelta(seconds=1)
        self.passed += timedelta(seconds=1)
        self.place /= "a"
        self.dtype = torch.float64 if len(self.seen) % 3 else torch.float32
        self.row[0] *= 0.9
        self.row.append(0.1)
        self.late = (self.late or 0) + 0.1j
        self.steps = self.steps.next()
        counts = self.steps + len(self.seen) + len(self.window) + self.part.stop + self.shape[0] + self.at.second
        counts += self.passed.seconds + len(self.place.parts) + self.dtype.itemsize
        numbers = self.phase.real + float(self.share) + float(self.price) + sum(self.row) + self.late.imag
        return counts / 100 + numbers


class Keeps(Net):
    def __init__(self):
        super().__init__()
        self.values = Values()
        self.shares = {"a": Fraction(1), "b": 1j}
        self.hparams.step = timedelta(seconds=1)

    def training_step(self, batch, batch_idx):
        self.shares["a"] *= Fraction(9, 10)
        self.shares["b"] *= 1 + 0.1j
        self.hparams.step *= 2
        factor = self.values.next() + float(self.shares["a"]) + self.shares["b"].imag + self.hparams.step.seconds / 1e5
        return self.note(self.loss(batch) * factor)


def test_they_go_on_as_they_were(tmp_path):
    check(Case(shuffled, Keeps, at=[3, 8]), tmp_path)


class Counting(Augmented):
    def __init__(self):
        super().__init__()
        self.steps = Steps(0)

    def __getitem__(self, index):
        self.steps = self.steps.next()
        return super().__getitem__(index) + self.steps / 10


def test_a_dataset_goes_on_with_a_number_of_a_class_of_its_own(tmp_path):
    check(Case(lambda: DataLoader(Counting(), batch_size=BATCH, shuffle=True), at=[3, 8]), tmp_path)


def test_a_number_of_a_class_that_is_not_found_again_is_named(tmp_path, caplog):
    class Local(int):
        pass

    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.steps = Local(0)

        def training_step(self, batch, batch_idx):
            self.steps = Local(self.steps + 1)
            return super().training_step(batch, batch_idx)

    train(Case(shuffled, Counts, steps=2), tmp_path, 1)
    assert "attribute module.steps has changed since training began, and is not saved: it holds Local" in caplog.text


class Clock(Net):
    """Keeps the time of this life."""

    def on_train_start(self):
        self.began = datetime.now(UTC)
        self.last = datetime.now(UTC)

    def training_step(self, batch, batch_idx):
        self.last = datetime.now(UTC)
        return super().training_step(batch, batch_idx)


def test_the_time_at_which_a_life_began_is_not_an_earlier_ones(tmp_path):
    train(Case(shuffled, Clock, steps=3), tmp_path, 1)
    before = datetime.now(UTC)
    _, _, trainer = train(Case(shuffled, Clock, steps=4), tmp_path / "again", 1, tmp_path / "step=2")
    assert trainer.lightning_module.began > before


class Counts:
    def __init__(self):
        self.calls = 0


class Crowded(Net):
    def __init__(self):
        super().__init__()
        self.again = self.make()
        self.empty = []

    @staticmethod
    def make():
        return [Counts() for _ in range(1100)]

    def on_fit_start(self):
        self.early = self.make()

    def on_train_start(self):
        self.late, self.again, self.empty = self.make(), self.make(), self.make()

    def training_step(self, batch, batch_idx):
        factor = 1.0
        for some in (self.early, self.late, self.again, self.empty):
            some[batch_idx].calls += 1
            factor *= 0.9 ** some[batch_idx].calls
        return self.note(self.loss(batch) * factor)


def test_long_lists_of_objects_that_are_made_when_training_starts_go_on_and_are_not_named(tmp_path, caplog):
    check_chain(Case(shuffled, Crowded, at=[3, 5, 8]), tmp_path)
    assert not [
        record for record in caplog.records if record.levelname == "WARNING" and "exact resume" in record.message
    ]
