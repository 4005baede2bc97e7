"""What hooks set to another function, object or member of an enumeration."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass

import torch
from exact.runs import Augmented, Case, Net, check, shuffled, train
from torch import nn
from torch.utils.data import DataLoader


class Phase(enum.Enum):
    WARM = enum.auto()
    MAIN = enum.auto()


@dataclass(slots=True)
class State:
    phase: Phase = Phase.WARM


class Phases(Net):
    """Counts with a phase of its own, and with one of an object."""

    def __init__(self):
        super().__init__()
        self.phase, self.state = Phase.WARM, State()

    def training_step(self, batch, batch_idx):
        factor = sum(1 if one is Phase.WARM else 3 for one in (self.phase, self.state.phase))
        return self.note(self.loss(batch) * factor)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 4:
            self.phase = Phase.MAIN
        if self.global_step == 6:
            self.state.phase = Phase.MAIN


def weak(sample):
    return sample


def strong(sample):
    return sample * 2


class Changed(Augmented):
    def __init__(self):
        super().__init__()
        self.transform = weak

    def __getitem__(self, index):
        return self.transform(super().__getitem__(index))


class Swaps(Net):
    """Sets in each step what it sets in an epoch; and, as ever, something else of the same kind."""

    def __init__(self):
        super().__init__()
        self.criterion, self.measure, self.head, self.late = nn.MSELoss(), torch.abs, lambda x: x, None
        self.again = self.made()
        self.lazy = nn.LazyLinear(1)

    def made(self):
        return lambda x: x

    def on_train_start(self):
        self.head = self.made()  # in each life

    def on_train_batch_start(self, batch, batch_idx):
        self.lazy(batch)  # becomes a Linear

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.criterion, self.measure, self.late, self.again = nn.L1Loss(), torch.square, weak, self.made()
        self.trainer.train_dataloader.dataset.transform = strong


def test_a_member_of_an_enumeration_goes_on(tmp_path):
    check(Case(shuffled, Phases, at=[3, 7]), tmp_path)


def test_what_is_another_function_or_object_now_is_named_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(Case(lambda: DataLoader(Changed(), batch_size=4), Swaps, steps=3), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "exact resume, attribute" in record.getMessage()]
    measure, dataset, criterion = told
    assert "module.criterion is torch.nn.modules.loss.L1Loss now, and was torch.nn.modules.loss.MSELoss" in criterion
    assert "module.measure is torch._VariableFunctionsClass.square now" in measure
    assert "dataset 0.transform is " in dataset
