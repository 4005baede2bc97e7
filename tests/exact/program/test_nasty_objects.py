"""Objects that raise, or lie, when they are asked what they are and have: a run trains, saves and goes on with them all the
same, and what is beside them is kept."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from exact.runs import Augmented, Case, Net, train
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader


def boom(*arguments: Any) -> Any:
    raise ZeroDivisionError


class Raises:
    """One that does not know yet what it stands for."""

    __class__ = __dict__ = property(boom)


class Lies:
    @property
    def __class__(self):
        return torch.Tensor


class IsNoModule:
    @property
    def __class__(self):
        return nn.Module


class Missing:
    def __getattr__(self, name):
        raise ZeroDivisionError


class AnyName:
    """It has an answer for each name and no ``__dict__``, as what llvmlite, and so numba, calls its library by."""

    __slots__ = ("known",)

    def __init__(self):
        self.known = {}

    def __getattr__(self, name):
        return self.known.setdefault(name, AnyName())


class OddClass(type):
    def __getattr__(cls, name):
        raise ZeroDivisionError


class WithoutHash(type):
    __hash__ = boom


class Unnamed(type):
    __module__ = property(boom)


class Nameless:
    __repr__ = __str__ = boom


class Compared:
    __hash__ = object.__hash__

    def __eq__(self, other):
        return np.array([True, False])


class OwnState:
    def state_dict(self):
        state = {}
        state["itself"] = state
        return state

    def load_state_dict(self, state):
        raise ZeroDivisionError


class OddMethods:
    class Raises:
        def __get__(self, one, kind=None):
            raise ZeroDivisionError

    state_dict = load_state_dict = Raises()


class Closed(list):
    __len__ = __iter__ = boom


class NoArray:
    """As one of a GPU, or of a file that is closed."""

    size = 3

    def __array__(self, dtype=None, copy=None):
        raise TypeError


class WithoutSize(NoArray):
    """As tables of polars."""

    size = property(boom)


def holding_itself():
    value = [1]
    value.append(value)
    return value


NASTY = [
    Raises, Lies, IsNoModule, Missing, AnyName, Compared, OwnState, OddMethods, holding_itself, mock.MagicMock,
    lambda: mock.MagicMock(spec=nn.Module), lambda: OddClass("A", (), {})(), lambda: WithoutHash("B", (), {})(),
    lambda: Unnamed("C", (), {})(), lambda: {Nameless(): Nameless()}, lambda: Closed([1]),
    lambda: np.array([Compared()], dtype=object), NoArray, WithoutSize,
]  # fmt: skip


def fill(holder: Any) -> None:
    holder.count = 0
    holder.one, holder.among = [make() for make in NASTY], {str(i): make() for i, make in enumerate(NASTY)}
    holder.many, holder.queue = [NASTY[i % len(NASTY)]() for i in range(60)], deque(make() for make in NASTY)
    for i, make in enumerate(NASTY):
        vars(holder)[f"nasty_{i}"] = make()  # torch itself would ask what it is
    holder.function = lambda: (holder.one, count)
    count = 0


def change(holder: Any) -> None:
    holder.count += 1
    holder.one.append(NASTY[holder.count % len(NASTY)]())
    holder.among[str(holder.count)] = NASTY[holder.count % len(NASTY)]()
    vars(holder)[f"nasty_{holder.count % len(NASTY)}"] = NASTY[holder.count % len(NASTY)]()


class Data(Augmented):
    def __init__(self):
        super().__init__()
        fill(self)

    def __getitem__(self, index):
        change(self)
        return super().__getitem__(index)


class Holds(Net):
    def __init__(self):
        super().__init__()
        fill(self)

    def training_step(self, batch, batch_idx):
        change(self)
        return super().training_step(batch, batch_idx) * (1 + self.count)


class Held(Callback):
    def __init__(self):
        fill(self)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        change(self)


def test_a_run_that_holds_them_everywhere_goes_on_where_it_was(tmp_path, caplog):
    case = Case(lambda: DataLoader(Data(), batch_size=4, shuffle=True), Holds, steps=6, callbacks=lambda: [Held()])
    with caplog.at_level(logging.INFO):
        straight, batches, _ = train(case, tmp_path / "run", 1)
        resumed, _, trainer = train(case, tmp_path / "run", 2, tmp_path / "run" / "step=4")
    assert resumed == straight[batches[4] :]
    assert trainer.lightning_module.count == 6


@dataclass(frozen=True)
class Frozen:
    count: int = 0


def test_what_is_frozen_and_counts_all_the_same_goes_on(tmp_path):
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.frozen = Frozen()

        def training_step(self, batch, batch_idx):
            object.__setattr__(self.frozen, "count", self.frozen.count + 1)
            return super().training_step(batch, batch_idx) * self.frozen.count

    case = Case(lambda: DataLoader(Augmented(), batch_size=4, shuffle=True), Counts, steps=4)
    straight, batches, _ = train(case, tmp_path / "run", 1)
    resumed, _, trainer = train(case, tmp_path / "run", 2, tmp_path / "run" / "step=2")
    assert resumed == straight[batches[2] :]
    assert trainer.lightning_module.frozen.count == 4
