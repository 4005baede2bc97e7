"""Samplers and datasets that keep more than numbers: lists, arrays and tensors that change while training goes on."""

from __future__ import annotations

import random
from collections import Counter, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exact.loaders.test_loaders import Remembers
from exact.runs import BATCH, SAMPLES, Augmented, Case, check, train
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader, IterableDataset, Sampler

from nemologger.exact.program.owned import Owned, Values
from nemologger.exact.values import contents, plain_contents

LATER = (3, 8)


class Ordered(Sampler):
    """Shuffles an order that it keeps, in place."""

    def __init__(self, order: Any) -> None:
        self.order = order

    def __len__(self) -> int:
        return SAMPLES

    def shuffle(self) -> None:
        random.shuffle(self.order)

    def __iter__(self):
        self.shuffle()
        return iter([int(index) for index in self.order])


class ArrayOrdered(Ordered):
    def shuffle(self) -> None:
        np.random.shuffle(self.order)


class Rebound(Ordered):
    """Makes another array each time; the first one belongs to somebody else."""

    def shuffle(self) -> None:
        self.order = self.order[np.random.permutation(SAMPLES)]


class TensorOrdered(Ordered):
    def shuffle(self) -> None:
        self.order.copy_(self.order[torch.randperm(SAMPLES)])


class Counts(Augmented):
    """What it returns depends on all that it has counted."""

    def __init__(self) -> None:
        super().__init__()
        self.list, self.array, self.tensor = [0] * SAMPLES, np.zeros(2), torch.zeros(2)
        self.scalar, self.total = np.int64(0), torch.tensor(0)
        self.seen: dict[int, list[int]] = {}
        self.last: deque[int] = deque(maxlen=3)
        self.often: Counter[int] = Counter()
        self.nested = [[0], {"a": (0, 0)}]

    def __getitem__(self, index: int) -> torch.Tensor:
        self.list[index] += 1
        self.array[index % 2] += 1
        self.tensor[index % 2] += 2
        self.scalar, self.total = self.scalar + 1, self.total + index
        self.seen.setdefault(index, []).append(len(self.seen))
        self.last.append(index)
        self.often[index % 3] += 1
        self.nested[0][0] += index
        self.nested[1]["a"] = (index, self.nested[1]["a"][0])
        numbers = [
            self.list[index], *self.array, *self.tensor, self.scalar, self.total, *self.seen[index], sum(self.last),
            self.often.most_common(1)[0][1], self.nested[0][0] % 7, sum(self.nested[1]["a"]),
        ]  # fmt: skip
        return super().__getitem__(index) + sum(float(number) for number in numbers) / 1000


class Files(IterableDataset):
    """Shuffles its files in place with each pass."""

    def __init__(self) -> None:
        self.files = [f"file-{i}" for i in range(SAMPLES)]

    def __iter__(self):
        random.shuffle(self.files)
        for name in self.files:
            yield torch.full((4,), float(name[5:]))


def sampled(sampler: Sampler) -> DataLoader[torch.Tensor]:
    return DataLoader(Augmented(), batch_size=BATCH, sampler=sampler)


CASES = {
    "list": Case(lambda: sampled(Ordered(list(range(SAMPLES)))), at=LATER),
    "list of numpy's integers": Case(lambda: sampled(Ordered(list(np.arange(SAMPLES)))), at=LATER),
    "array": Case(lambda: sampled(ArrayOrdered(np.arange(SAMPLES))), at=LATER),
    "another array": Case(lambda: sampled(Rebound(np.arange(SAMPLES))), at=LATER),
    "tensor": Case(lambda: sampled(TensorOrdered(torch.arange(SAMPLES))), at=(8,)),
    "dataset": Case(lambda: DataLoader(Counts(), batch_size=BATCH), at=(3, 6, 8)),
    "stream": Case(lambda: DataLoader(Files(), batch_size=BATCH), at=(8,)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_a_loader_keeps_is_saved(case, tmp_path):
    check(case, tmp_path)


CHANGES: dict[str, tuple[Any, Any]] = {
    "swapped": ([1, 2, 3] * 40, lambda v: v.reverse()),
    "one more, one less": (list(range(100)), lambda v: v.__setitem__(7, v[7] + 1)),
    "one of many": (list(range(200_000)), lambda v: v.__setitem__(77_777, 0)),
    "many shuffled": (list(range(600_000)), random.shuffle),
    "a long list in a list shuffled": ([list(range(300_000)) for _ in range(3)], lambda v: random.shuffle(v[1])),
    "many objects shuffled": ([object() for _ in range(100_000)], random.shuffle),
    "nested": ([[0], {"a": [0]}], lambda v: v[1]["a"].append(1)),
    "array in a list": ([np.zeros(3)], lambda v: v[0].fill(1)),
    "tensor in a dictionary": ({"a": torch.zeros(3)}, lambda v: v["a"].fill_(1)),
    "array": (np.zeros((3, 3)), lambda v: v.__setitem__((1, 1), 1)),
    "large array": (np.zeros(20_000_000), lambda v: v.fill(1)),
    "tensor behind its back": (torch.zeros(3), lambda v: v.numpy().fill(1)),
    "dictionary": ({1: 2}, lambda v: v.update({1: 3})),
    "counter": (Counter("aab"), lambda v: v.update("b")),
    "set": ({1}, lambda v: v.add(2)),
    "deque": (deque([1, 2]), lambda v: v.rotate(1)),
    "objects": ([Augmented()], lambda v: v.append(v[0])),
    "array of objects": (np.array([{}, {}], dtype=object), lambda v: v.__setitem__(0, {1: 1})),
}


@pytest.mark.parametrize(("value", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_shows(value, change):
    before = contents.fingerprint(value)
    assert contents.fingerprint(value) == before
    change(value)
    assert contents.fingerprint(value) != before


def test_what_holds_itself_has_a_fingerprint_too():
    value: list[Any] = [1]
    value.append(value)
    before = contents.fingerprint(value)
    value.append(2)
    assert contents.fingerprint(value) != before


class Holder:
    def __init__(self) -> None:
        self.base = list(range(5))
        self.order = self.base
        self.table = np.arange(5)
        self.view = self.table
        self.often: Counter[str] = Counter()


def test_others_who_hold_the_same_list_see_it_change_and_those_who_hold_the_old_one_do_not():
    def changed(holder: Holder) -> Holder:
        holder.base.reverse()  # in place
        holder.view = holder.table[::-1]  # another one
        holder.often = Counter("abb")
        return holder

    holder = Holder()
    owned = Owned({"dataset": holder})
    changed(holder)
    found = Values.from_plain(owned.values().to_plain())
    assert set(found.contents or {}) == {f"dataset.{name}" for name in ("base", "order", "view", "often")}
    fresh = Holder()
    Owned({"dataset": fresh}).restore(found)
    assert fresh.order is fresh.base
    assert fresh.base == [4, 3, 2, 1, 0]
    assert fresh.table.tolist() == [0, 1, 2, 3, 4]
    assert fresh.view.tolist() == [4, 3, 2, 1, 0]
    assert fresh.often.most_common(1) == [("b", 2)]


def test_exactly_means_as_the_program_made_it_where_nothing_was_saved():
    fresh, untouched = Holder(), Values(contents={})
    owned = Owned({"dataset": fresh})
    fresh.base.reverse()
    owned.restore(untouched)
    assert fresh.base == [4, 3, 2, 1, 0]
    owned.restore(untouched, exactly=True)
    assert fresh.base == [0, 1, 2, 3, 4]


def test_what_cannot_be_kept_stays_as_it_is_now():
    holder = Holder()
    owned = Owned({"dataset": holder})
    holder.base.append(object())  # type: ignore[arg-type]
    owned.restore(owned.values(), exactly=True)
    assert len(holder.base) == 6


class Loses(Augmented):
    """Changes what cannot be kept, among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: list[Any] = []
        self.beside = [0]
        self.large = np.zeros(plain_contents.MOST_BYTES // 8 + 1)
        self.fixed = [object(), object()]

    def __getitem__(self, index: int) -> torch.Tensor:
        self.objects.append(object())
        self.beside[0] += 1
        self.large[0] += 1
        self.late = [index]
        return super().__getitem__(index)


def test_what_cannot_be_kept_is_said_once_by_name(tmp_path, caplog):
    train(Case(lambda: DataLoader(Loses(), batch_size=BATCH), steps=4), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "is not saved" in record.getMessage()]
    why = {message.partition(": ")[2].split(" ")[0]: message for message in told}
    assert len(told) == len(why) == 4
    assert "it holds object objects" in why["dataset.objects"]
    assert "it is too large" in why["dataset.large"]
    assert "it was not there when training began" in why["dataset.late"]
    assert "it belongs to an object of which another part cannot be kept" in why["dataset.beside"]
    assert "state_dict()" in why["dataset.beside"]


class Unsized(ArrayOrdered):
    __len__ = None  # type: ignore[assignment]


class Grows(Augmented):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = np.zeros(100_000)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.sizes[index] += 1
        return super().__getitem__(index)


def test_what_takes_too_long_for_every_batch_is_named_at_a_save(tmp_path, caplog):
    def loader() -> DataLoader[torch.Tensor]:
        return DataLoader(Grows(), batch_size=BATCH, sampler=Unsized(np.arange(SAMPLES)))

    train(Case(loader, steps=4), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "is not saved" in record.getMessage()]
    assert len(told) == 1
    assert "dataset.sizes" in told[0]
    assert "__len__" in told[0]


def test_a_dataset_with_state_and_lightnings_own_wrappers_are_left_alone(tmp_path, caplog):
    train(Case(lambda: DataLoader(Remembers(), batch_size=BATCH), steps=4), tmp_path, 1)
    assert "is not saved" not in caplog.text
    wrapper = DistributedSamplerWrapper(Ordered(list(range(SAMPLES))), num_replicas=1, rank=0)
    owned = Owned({"sampler": wrapper})
    list(wrapper)
    assert set(owned.values().contents or {}) == {"sampler.dataset._sampler.order"}
    assert owned.lost == {}


def test_caches_of_tables_are_not_told_of():
    class Table:
        def __init__(self):
            self._cache = {}

        def __array__(self, dtype=None, copy=None):
            return np.zeros(3)

    holder = SimpleNamespace(table=Table())
    owned = Owned({"sampler": holder})
    holder.table._cache["dtype"] = type
    owned.values()
    assert owned.lost == {}


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_a_large_one_in_a_list_that_is_changed_in_place_shows(make):
    kept = {"banks": [make(50_000), make(50_000)]}
    before = contents.fingerprint(kept)
    kept["banks"][1] += 1
    assert contents.fingerprint(kept) != before
