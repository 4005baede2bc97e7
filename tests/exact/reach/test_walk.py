"""Generators and counters wherever a dataset has them, and what cannot be kept is named."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import random
import sys
from collections.abc import Mapping
from functools import partial
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exact.runs import BATCH, SAMPLES, Augmented, Case, Net, check, shuffled, train
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Sampler, Subset
from typing_extensions import Protocol

from nemologger.exact.program.owned import Owned, Values
from nemologger.exact.reach.code import is_class_of_the_program

of_this_file = np.random.default_rng(3)
of_functions = random.Random(9)


class OfClass:
    """One generator for all that have none of their own, as MONAI's transforms."""

    rng = np.random.RandomState(4)

    def __call__(self, value):
        return value + self.rng.random()


class InSlots:
    __slots__ = ("__rng", "calls")

    def __init__(self):
        self.__rng, self.calls = random.Random(5), 0

    def __call__(self, value):
        self.calls += 1
        return value + self.__rng.random() + self.calls / 50


class Module(nn.Module):
    """A transform like torchvision's newer ones."""

    def __init__(self):
        super().__init__()
        self.rng, self.calls = torch.Generator().manual_seed(6), 0

    def forward(self, value):
        self.calls += 1
        return value + torch.rand(1, generator=self.rng) + self.calls / 50


def of_function(value):
    return value + of_this_file.random()


def drawn():
    return of_functions.random()


class Draws:
    """What draws is named by a property, and what it draws from by that alone."""

    @property
    def noise(self):
        return drawn()

    def __call__(self, value):
        return value + self.noise


def with_argument(rng, value):
    return value + rng.random()


def closure():
    rng = np.random.default_rng(7)
    return lambda value: value + rng.random()


class Transformed(Augmented):
    def __init__(self, transforms):
        super().__init__()
        self.transform = SimpleNamespace(steps=transforms)
        self.epoch = multiprocessing.Value("i", 0)

    def __getitem__(self, index):
        self.epoch.value += 1
        value = super().__getitem__(index) + self.epoch.value / 70
        for step in self.transform.steps:
            value = step(value)
        return value


def transforms():
    OfClass.rng, globals()["of_this_file"] = np.random.RandomState(4), np.random.default_rng(3)  # a new process
    globals()["of_functions"] = random.Random(9)
    bound = InSlots()
    return [
        OfClass(), InSlots(), nn.Sequential(Module()), of_function, partial(with_argument, np.random.default_rng(8)),
        closure(), bound.__call__, Draws(),
    ]  # fmt: skip


def test_wherever_a_transform_has_its_generator(tmp_path):
    def loader():
        parts = ConcatDataset([Subset(ConcatDataset([Transformed(transforms())]), list(range(SAMPLES)))])
        return DataLoader(parts, batch_size=BATCH, shuffle=True)

    check(Case(loader, at=(3, 8)), tmp_path)


class Window(Sampler):
    """Goes on in the order of another sampler when an epoch begins."""

    def __init__(self):
        self.inner, self.order = RandomSampler(range(SAMPLES)), iter(())

    def __len__(self):
        return SAMPLES - 2

    def __iter__(self):
        for _ in range(len(self)):
            index = next(self.order, None)
            if index is None:
                self.order = iter(self.inner)
                index = next(self.order)
            yield index


class Begins(Augmented):
    """Makes an object that counts when it first needs it."""

    def __init__(self):
        super().__init__()
        self.counter: Any = None
        self.numbers = itertools.count()
        self.many = [random.Random(i) for i in range(40)]  # kept: nothing to say

    def __getitem__(self, index):
        self.counter = self.counter or SimpleNamespace(calls=0)
        self.counter.calls += 1
        return super().__getitem__(index) + self.counter.calls + next(self.numbers) + self.many[index].random()


def test_what_has_a_place_of_its_own_is_named(tmp_path, caplog):
    loader = lambda: DataLoader(Begins(), batch_size=BATCH, sampler=Window())  # noqa: E731
    train(Case(loader, steps=8, ckpt={"every_n_train_steps": 2}), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "is not saved" in record.getMessage()]
    names = {message.partition(": ")[2].split(" ")[0]: message for message in told}
    assert set(names) == {"below.order", "dataset.counter", "dataset.numbers"}
    assert "it is an iterator, whose place cannot be kept" in names["dataset.numbers"]
    assert "it was made after training began" in names["dataset.counter"]


class Unread(Mapping):
    """Reads a file, or a configuration that is not complete."""

    __len__ = __iter__ = __getitem__ = None


class Proxy:
    """Does not have yet what it stands for."""

    @property
    def __class__(self):
        raise OSError

    __dict__ = __class__


class Forwards:
    """Looks for what it has not in something that it has not yet."""

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Compared(type):
    def __eq__(self, other):
        return self is other


def test_what_must_not_be_asked_is_left_alone():
    odd = [random.SystemRandom(), Unread(), Proxy(), Forwards(), type("A", (), {"__module__": None})()]
    owned = Owned({"dataset": SimpleNamespace(odd=odd, proxy=Proxy(), one=Compared("Unhashable", (), {})())})
    assert owned.values() == Values({}, {}, {})


def test_a_part_of_the_model_is_not_set_back_with_the_data():
    net = nn.Linear(1, 1)
    net.calls, owned = 0, Owned({"dataset": SimpleNamespace(teacher=net)})
    net.eval().calls = 3
    assert owned.values().counters == {}


@pytest.mark.parametrize("calls", [0, 5])
def test_locks_and_queues_are_left_alone(calls):
    holder = SimpleNamespace(queue=Queue())
    owned = Owned({"dataset": holder})
    for _ in range(calls):
        holder.queue.put(1)
    values = owned.values()
    assert (values.counters, values.contents, owned.lost) == ({}, {}, {})


def test_what_bindings_make_of_cpp_is_not_the_programs():
    """Their classes may have a module that nobody has imported, as code of the program may that was compiled by itself."""
    bound = type("instance", (), {"__module__": "Boost.Python"})
    written = type("Counts", (), {"__module__": "a_configuration", "count": lambda self: None})
    assert [is_class_of_the_program(kind) for kind in (bound, written, dict, random.Random)] == [
        False,
        True,
        False,
        False,
    ]


@pytest.fixture
def goes_on(tmp_path, monkeypatch):
    """Whether the dataset ``Noisy`` of a module of this source gives the same after a resume as without."""
    monkeypatch.syspath_prepend(tmp_path)

    def new():
        for name in [name for name in sys.modules if name.startswith(("a_project", "a_dataset"))]:
            monkeypatch.delitem(sys.modules, name)
        dataset = importlib.import_module("a_dataset").Noisy()
        return dataset, Owned({"dataset": dataset})

    def see(source):
        (tmp_path / "a_dataset.py").write_text(source)
        dataset, owned = new()
        dataset[0]
        saved = owned.values()
        expected = [dataset[0] for _ in range(3)]
        again, owned = new()
        owned.restore(saved)
        return [again[0] for _ in range(3)] == expected

    return see


DRAWS = """
import random

class Of:
    rng = random.Random(1)

    @classmethod
    def drawn(cls):
        return cls.rng.random()

class Step:
    calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls

LISTED, NAMED, STEPS, CHOSEN = [random.Random(2)], {"a": random.Random(3)}, [Step()], {"first": Step()}

class Noisy:
    def __getitem__(self, index):
        return """


@pytest.mark.parametrize(
    "drawn",
    ["Of.rng.random()", "Of.drawn()", "LISTED[0].random()", "NAMED['a'].random()", "STEPS[0]()", "CHOSEN['first']()"],
)
def test_what_a_class_and_lists_of_a_file_hold_goes_on(goes_on, drawn):
    assert goes_on(f"{DRAWS}{drawn}\n")


class Step:
    def __init__(self):
        self.calls, self.rng = 0, random.Random(3)

    def __call__(self):
        self.calls += 1
        return self.calls / 10 + self.rng.random()


class Weighted(Net):
    def training_step(self, batch, batch_idx):
        return self.note(self.loss(batch) * (1 + of_a_list[0]() + Drawn.rng.random()))


class Drawn:
    rng = random.Random(1)


of_a_list = [Step()]


def test_so_does_what_a_module_uses_of_them(tmp_path):
    def model():
        of_a_list[:], Drawn.rng = [Step()], random.Random(1)  # a new process
        return Weighted()

    check(Case(shuffled, model, at=(3,)), tmp_path)


def test_an_iterator_of_a_file_is_named():
    global numbers
    numbers = itertools.count()
    owned = Owned({"dataset": Counted()})
    owned.values()
    assert owned.lost == {}  # what numbers objects as they are made is where the next program has it
    next(numbers)
    owned.values()
    assert owned.lost == {f"{__name__}:globals.numbers": "is an iterator, whose place cannot be kept"}


class Counted:
    def __getitem__(self, index):
        return next(numbers)


@pytest.mark.parametrize("packages", ["with a file", "without"])
def test_what_a_function_of_a_package_draws_from_and_counts_goes_on(goes_on, tmp_path, packages):
    inner = tmp_path / "a_project" / "data"
    inner.mkdir(parents=True)
    for directory in (inner, inner.parent) if packages == "with a file" else ():
        (directory / "__init__.py").touch()
    (inner / "noise.py").write_text(
        "import random\nrng, calls = random.Random(1), 0\n"
        "def drawn():\n    global calls\n    calls += 1\n    return calls + rng.random()\n"
    )
    assert goes_on(
        "import a_project.data.noise\nclass Noisy:\n"
        "    def __getitem__(self, index):\n        return a_project.data.noise.drawn()\n"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "from a_project.noise import drawn",
        "from a_project import noise; drawn = noise.drawn",
        "from .noise import drawn",
        "import a_project.noise as noise; drawn = noise.drawn",
    ],
)
def test_so_does_that_of_a_file_that_is_imported_within_a_function(goes_on, tmp_path, imports):
    """Against a circle of imports, say; somebody else has imported it."""
    (tmp_path / "a_project").mkdir()
    (tmp_path / "a_project" / "noise.py").write_text(
        "import random\nrng, calls = random.Random(1), 0\n"
        "def drawn():\n    global calls\n    calls += 1\n    return calls + rng.random()\n"
    )
    (tmp_path / "a_project" / "dataset.py").write_text(
        f"class Noisy:\n    def __getitem__(self, index):\n        {imports}\n        return drawn()\n"
    )
    assert goes_on("import a_project.noise\nfrom a_project.dataset import Noisy")


def test_so_does_what_a_function_makes_an_attribute_of_itself(goes_on):
    assert goes_on(
        "def counted():\n    counted.calls = getattr(counted, 'calls', 0) + 1\n    return counted.calls\n"
        "class Noisy:\n    def __getitem__(self, index):\n        return counted()\n"
    )


class Lengthy(Protocol):
    """Python 3.11 and earlier: of typing_extensions, whose protocols say themselves which others they are equal to."""

    def __len__(self) -> int: ...


class Cyclic(Lengthy):
    """Goes through its samples in one round after another, an epoch through some of them, as gluonts's streams."""

    def __init__(self) -> None:
        self.samples, self.drawn, self.rng = iter(range(9)), 0, random.Random(1)

    def __len__(self) -> int:
        return 3


def test_objects_of_protocols_are_looked_into():
    holder = Cyclic()
    owned = Owned({"dataset": holder})
    holder.drawn = next(holder.samples) + 5
    values = owned.values()
    assert values.counters == {"dataset.drawn": 5}
    assert "dataset.rng" in values.generators
    assert owned.lost == {"dataset.samples": "is an iterator, whose place cannot be kept"}
