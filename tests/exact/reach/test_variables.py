"""What code counts in variables: of closures, of files and of classes."""

from __future__ import annotations

import re
import tempfile
import threading
import weakref
from collections import deque
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exact.runs import BATCH, SAMPLES, Augmented, Case, Net, check, shuffled, train
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from nemologger.exact.program.owned import Owned

COUNT = 0
SEEN: list[int] = []
STATE: Any = None
MEMO: Any = None


def of_file(value):
    global COUNT
    COUNT += 1
    SEEN[0] += 1
    STATE.calls += 1
    return value + COUNT / 50 + SEEN[0] / 70 + STATE.calls / 90


def behind(value):
    return of_file(value)


def closure():
    calls, listed = 0, [0]

    def count(value):
        nonlocal calls
        calls += 1
        listed[0] += 1
        return value + calls / 50 + listed[0] / 70

    return count


def with_default(value, calls):
    calls[0] += 1
    return value + calls[0] / 50


class State:
    calls = 0


class OfClass:
    calls, listed = 0, [0]

    def __call__(self, value):
        OfClass.calls += 1
        self.listed[0] += 1
        return value + OfClass.calls / 50 + self.listed[0] / 70


class OfType:
    calls = 0

    def __call__(self, value):
        type(self).calls += 1
        return value + self.calls / 50


class Buffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, value):
        self.calls += 1
        return value + self.calls / 50


class Counts(Augmented):
    def __init__(self, *steps):
        super().__init__()
        self.steps = steps

    def __getitem__(self, index):
        value = super().__getitem__(index)
        for step in self.steps:
            value = step(value)
        return value


class Shifted(Sampler):
    def __init__(self, step):
        self.step = step

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return (int(self.step(index) * 50) % SAMPLES for index in range(SAMPLES))


def everywhere(**options):
    """In a new process everything is as it was written."""
    global COUNT, SEEN, STATE
    COUNT, SEEN, STATE, OfClass.calls, OfClass.listed, OfType.calls = 0, [0], State(), 0, [0], 0
    calls, collated = 0, closure()

    class InMethod(Counts):
        def __getitem__(self, index):
            nonlocal calls
            calls += 1
            return super().__getitem__(index) + calls / 50

    dataset = InMethod(closure(), partial(with_default, calls=[0]), behind, OfClass(), OfType(), Buffer())
    options = {"batch_size": BATCH, "sampler": Shifted(closure()), **options}
    return DataLoader(dataset, collate_fn=lambda batch: collated(default_collate(batch)), **options)


def test_they_go_on_as_they_were(tmp_path):
    check(Case(everywhere, at=(3, 6, 8)), tmp_path)


class Stream(IterableDataset):
    """Says where it is, and nothing of its transform."""

    def __init__(self):
        self.place, self.step = 0, closure()

    def __iter__(self):
        for index in range(self.place, SAMPLES):
            self.place = index + 1
            yield self.step(torch.full((4,), float(index)))
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_they_are_in_no_state_dict(tmp_path):
    def loader():
        collated = closure()
        return DataLoader(Stream(), BATCH, collate_fn=lambda batch: collated(default_collate(batch)))

    check(Case(loader, at=(3, 6, 8)), tmp_path)


def test_in_workers_they_are_named(tmp_path, caplog):
    def loader():
        return everywhere(num_workers=1, batch_size=2, multiprocessing_context="fork")  # closures cannot be pickled

    train(Case(loader, steps=10, ckpt={"every_n_train_steps": 10}), tmp_path, 1)
    (told,) = [record.getMessage() for record in caplog.records if "in its worker processes" in record.getMessage()]
    assert "collate_fn.collated.calls" in told
    assert "and 8 more change" in told


class Opens(Augmented):
    """Opens a file when it first needs it."""

    def __init__(self):
        super().__init__()
        self.is_open, self.file, self.served = False, None, 0

    def __getitem__(self, index):
        if not self.is_open:
            self.file, self.is_open = SimpleNamespace(read=lambda: 1), True
        self.served += self.file.read()
        return super().__getitem__(index) + self.served / 50


def test_what_was_open_is_opened_again(tmp_path):
    check(Case(lambda: DataLoader(Opens(), batch_size=BATCH), at=(3,)), tmp_path)


SCRATCH = None


class Shards(Augmented):
    """Has one file open at a time, and says which; and a directory that is made when it is first needed."""

    def __init__(self, where):
        super().__init__()
        self.where, self.file, self.shard, self.name, self.served = where, None, -1, "", 0

    def __getitem__(self, index):
        global SCRATCH
        SCRATCH = SCRATCH or tempfile.mkdtemp(dir=self.where)
        if self.shard != index // 8:
            self.shard, self.name = index // 8, f"{index // 8}"
            self.file = SimpleNamespace(read=lambda number=self.shard: number + 1)
        self.served += self.file.read() * Path(SCRATCH).is_dir()
        return super().__getitem__(index) + self.served / 50


def test_which_file_was_open_is_found_out_again(tmp_path):
    def loader():  # in a new process, with what the last one cleaned up behind itself
        global SCRATCH
        if SCRATCH:
            Path(SCRATCH).rmdir()
        SCRATCH = None
        return DataLoader(Shards(tmp_path), batch_size=BATCH)

    check(Case(loader, at=(1, 3)), tmp_path / "runs")


def cached():
    memo, losses = {}, []

    @lru_cache
    def squared(index):
        return index**2

    def step(value):
        global MEMO
        MEMO = MEMO or {}
        key = len(losses)
        memo[key] = MEMO[key] = SimpleNamespace(value=squared(key))
        losses.append(float(value.mean()))
        return value

    return step


def test_caches_and_records_are_not_named(tmp_path, caplog):
    train(Case(lambda: DataLoader(Counts(cached()), batch_size=BATCH), steps=9), tmp_path, 1)
    assert "is not saved" not in caplog.text


def test_of_a_dictionary_the_program_gives_what_it_did_not_change():
    config = {"size": 1, "counted": 0, "gone": 2}
    first = Owned({"dataset": SimpleNamespace(config=config)})
    config["counted"] += 5
    del config["gone"]
    values = first.values()
    config["size"] = 3
    first.restore(values, exactly=True)
    assert config == {"size": 1, "counted": 5}
    config = {"size": 7, "counted": 0, "gone": 2, "new": 4}
    Owned({"dataset": SimpleNamespace(config=config)}).restore(values)
    assert config == {"size": 7, "counted": 5, "new": 4}


GROWING: dict[int, Any] = {}


def test_a_cache_is_neither_held_nor_looked_through():
    def remember(index):
        GROWING[index] = State()

    owned = Owned({"dataset": remember})
    for index in range(20):
        remember(index)
    assert owned.values().contents == {}
    held = weakref.ref(GROWING[0])
    remember(20)
    assert owned.values().contents == {}
    GROWING.clear()
    assert held() is None
    assert owned.lost == {}


class LazilyRead(dict):
    """Reads a file when it is gone through."""

    def __iter__(self):
        raise OSError

    __getitem__ = items = values = keys = __iter__


LAZY = LazilyRead(a=1)


def test_a_dictionary_is_not_asked_what_it_holds():
    owned = Owned({"dataset": lambda: LAZY})
    dict.update(LAZY, b=[2])
    assert owned.values().contents is not None
    assert owned.lost == {}


class Sample:
    def __init__(self, index):
        self.rng, self.seen, self.boxes, self.late = np.random.default_rng(index), 0, [0], None

    def draw(self):
        self.seen, self.late = self.seen + 1, [1]
        return self.rng.random() + self.seen


class Samples(Augmented):
    """One object for each sample, and some more of them."""

    def __init__(self, samples):
        super().__init__()
        self.parts = samples

    def __getitem__(self, index):
        return super().__getitem__(index) + self.parts[index].draw()


def test_one_object_for_each_sample(tmp_path, caplog):
    for name, many in {"list": lambda all_: all_, "dictionary": lambda all_: dict(enumerate(all_))}.items():
        loader = lambda many=many: DataLoader(Samples(many([Sample(i) for i in range(40)])), batch_size=BATCH)  # noqa: E731
        check(Case(loader, at=(8,), steps=13), tmp_path / name)
    assert "is not saved" not in caplog.text


def changed(samples, change, most=10_000):
    owned = Owned({"dataset": SimpleNamespace(samples=samples, many=samples * 30)}, most_counted=most)
    change(samples)
    return owned, owned.values()


def test_of_long_lists_what_cannot_be_kept_is_named():
    samples = [Sample(index) for index in range(40)]
    owned, values = changed(samples, lambda all_: [sample.boxes.append(1) for sample in all_])
    assert (values.counters, list(owned.lost)) == ({}, ["dataset.samples", "dataset.many"])
    owned, values = changed(samples, lambda all_: [sample.draw() for sample in all_], most=30)
    assert values.counters == {}
    assert "too many objects" in owned.lost["dataset.samples"]


@pytest.mark.parametrize(
    "make",
    [deque, set, frozenset, bytearray, object, datetime.now, Decimal, Fraction, range(3).__iter__, lambda: re.compile("a"),
     lambda: slice(1), lambda: (n for n in "a"), lambda: len, lambda: partial(len), threading.Lock, weakref.WeakSet,
     lambda: Path("a"), lambda: torch.Size([1]), lambda: torch.device("cpu"), SimpleNamespace, Exception, Counts, State],
)  # fmt: skip
def test_a_long_list_may_hold_anything(make):
    mixed = [make(), *range(20), SimpleNamespace(n=1)] * 2
    items = [make() for _ in range(40)]
    owned = Owned({"dataset": SimpleNamespace(items=items, mixed=mixed)})
    mixed[21].n = 2
    owned.restore(owned.values(), exactly=True)
    assert mixed[21].n == 2


def test_objects_that_have_changed_places_keep_their_numbers():
    samples = [Sample(index) for index in range(40)]
    for place, sample in enumerate(samples):
        sample.seen = place
    owned, values = changed(samples, list.reverse)
    assert values.counters == {}
    assert "dataset.samples" in owned.lost


class Registry:
    only: Any = None

    def __init__(self) -> None:
        self.calls = 0

    @classmethod
    def get(cls) -> Registry:
        if cls.only is None:
            cls.only = cls()
        return cls.only


class Registered(Net):
    """Counts in the only object of a class, which that keeps."""

    early = True

    def __init__(self) -> None:
        super().__init__()
        Registry.only = Registry() if self.early else None

    def loss(self, batch: Any) -> torch.Tensor:
        Registry.get().calls += 1
        return super().loss(batch) * Registry.get().calls


def test_the_only_object_of_a_class_goes_on(tmp_path):
    check(Case(shuffled, Registered, at=[3, 8]), tmp_path)


def test_one_that_is_made_while_training_is_named(tmp_path, caplog):
    class Late(Registered):
        early = False

    train(Case(shuffled, Late, steps=3), tmp_path, 1)
    (told,) = [record for record in caplog.records if "exact resume, attribute" in record.message]
    assert told.levelname == "WARNING"
    assert (
        ":Registry.only has changed since training began, and is not saved: it was made after training" in told.message
    )
