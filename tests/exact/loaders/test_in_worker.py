"""What a dataset has of its own, in the processes that load it."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact.loaders.test_workers import StatefulShard
from exact.runs import BATCH, SAMPLES, Augmented, Case, check, train
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nemologger.exact.loaders.in_worker import Watch
from nemologger.exact.program.owned import Owned, Values
from nemologger.exact.rng import reseed


class Owner(Augmented):
    """Has generators of its own."""

    def __init__(self):
        super().__init__()
        self.rngs = {"a": np.random.default_rng(1), "b": [random.Random(2), np.random.RandomState(5)]}
        self.torch = torch.Generator().manual_seed(4)

    def __getitem__(self, index):
        python, numpy = self.rngs["b"]
        noise = self.rngs["a"].normal() + python.random() + numpy.normal() + torch.rand(1, generator=self.torch)
        return super().__getitem__(index) + noise


def seeded_anew(worker):
    """As MONAI's: every worker seeds the transforms."""
    get_worker_info().dataset.torch = torch.Generator().manual_seed(get_worker_info().seed)


@pytest.mark.parametrize(
    "options", [{}, {"persistent_workers": True, "worker_init_fn": seeded_anew}], ids=["new", "stay"]
)
def test_its_generators_are_seeded_for_each_batch(options, tmp_path):
    loader = lambda: DataLoader(Owner(), batch_size=BATCH, shuffle=True, num_workers=2, **options)  # noqa: E731
    check(Case(loader, at=(3, 8), steps=13), tmp_path)


class Begins(Augmented):
    """Counts, and makes a generator when it needs one; and has a cache."""

    served, rng, chosen, drawn = 0, None, False, 0.0

    def __init__(self):
        super().__init__()
        self.cache = {}

    def __getitem__(self, index):
        self.served += 1
        self.cache.setdefault(index, [index])
        self.chosen, self.drawn = (
            random.random() < 0.5,
            random.random(),
        )  # notes of this sample, as of MONAI's transforms
        self.rng = self.rng or np.random.default_rng(get_worker_info().id)
        return super().__getitem__(index) + self.rng.random() + self.served


class Kept(DataLoader):
    """Keeps one iterator for all epochs, as timm's."""

    def __init__(self):
        super().__init__(Augmented(4 * SAMPLES), batch_size=BATCH)
        self.kept = super().__iter__()

    def __iter__(self):
        return (next(self.kept) for _ in range(2))


class KeptLate(DataLoader):
    """The same, made when it is first needed."""

    kept = None

    def __init__(self):
        super().__init__(Augmented(4 * SAMPLES), batch_size=BATCH)

    def __iter__(self):
        self.kept = self.kept or super().__iter__()
        return (next(self.kept) for _ in range(4))


class Around:
    """Goes through a loader as long as it lasts, four batches in an epoch, as speechbrain's LoopedLoader."""

    def __init__(self):
        self.loader = DataLoader(Augmented(4 * SAMPLES), batch_size=BATCH)
        self.kept = iter(self.loader)

    def __iter__(self):
        return (next(self.kept) for _ in range(4))


class Newest(DataLoader):
    """Remembers the newest iterator, to ask it how many batches it has given, as speechbrain's."""

    newest = None

    def __iter__(self):
        self.newest = super().__iter__()
        return self.newest


class Passes(IterableDataset):
    """Counts how often it was gone through."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield from (torch.full((4,), float(index * self.passes)) for index in range(SAMPLES))


class Masks:
    """A ``collate_fn`` that makes a generator when it needs one, in each process anew, as transformers' for masks."""

    def __init__(self, files=False):
        self.rng = self.for_pid = self.file = None
        self.files = files

    def __call__(self, samples):
        if self.rng is None or self.for_pid != os.getpid():
            worker = get_worker_info()
            self.rng = torch.Generator().manual_seed(7 if worker is None else 8 + worker.id)
            self.file = SimpleNamespace() if self.files else None
            self.for_pid = os.getpid()
        return torch.stack(samples) * torch.rand(1, generator=self.rng)


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_workers": 2, "persistent_workers": True}])
def test_generators_made_when_they_are_needed(options, tmp_path, caplog):
    loader = lambda: DataLoader(Augmented(), batch_size=BATCH, shuffle=True, collate_fn=Masks(), **options)  # noqa: E731
    check(Case(loader, at=(3, 8), steps=13), tmp_path)
    assert not [record for record in caplog.records if "change" in record.getMessage()]


@pytest.mark.parametrize("files", [False, True])
def test_one_that_belongs_to_a_process(files, monkeypatch):
    made, fresh = Masks(files), Masks(files)
    owned, of_fresh = Owned({"collate_fn": made}), Owned({"collate_fn": fresh})
    made([torch.ones(1)])
    values = Values.from_plain(owned.values().to_plain())
    monkeypatch.setattr(os, "getpid", lambda: -1)  # the next process
    of_fresh.restore(values)
    drawn = fresh([torch.ones(1)])
    if files:  # a process that took the number for its own would have no file
        assert fresh.file is not None
        assert list(owned.lost) == ["collate_fn.rng"]
    else:
        assert drawn == torch.rand(1, generator=made.rng)


def drawing(generator):
    """A ``collate_fn`` around a generator."""
    return lambda samples: torch.stack(samples) + torch.rand(1, generator=generator)


def test_a_collate_fn_draws_for_its_batch_alone_beside_a_stream_that_has_a_state(tmp_path, caplog):
    loader = lambda: DataLoader(  # noqa: E731
        StatefulShard(), batch_size=BATCH, num_workers=2, collate_fn=drawing(torch.Generator().manual_seed(3))
    )
    check(Case(loader, at=(3, 8), steps=13), tmp_path)
    assert not [record for record in caplog.records if "change" in record.getMessage()]


def counting():
    """A ``collate_fn`` that counts its batches."""
    batches = 0

    def collate(samples):
        nonlocal batches
        batches += 1
        return torch.stack(samples) + batches

    return collate


class LongNamed(Augmented):
    """Counts by a name that is longer than what a worker can tell."""

    def __getitem__(self, index):
        vars(self)["n" * 3000] = vars(self).get("n" * 3000, 0) + 1
        return super().__getitem__(index)


CHANGES = {
    "map-style": (lambda: DataLoader(Begins(), num_workers=2), "dataset.served change"),
    "beside a state": (
        lambda: DataLoader(StatefulShard(80), num_workers=1, collate_fn=counting()),
        "collate_fn.batches change",
    ),
    "a long name": (lambda: DataLoader(LongNamed(), num_workers=1), "dataset.nnnnn"),
    "iterator": (Kept, "keeps an iterator of its own (kept)"),
    "around one": (Around, "keeps an iterator of its own (kept)"),
    "late iterator": (KeptLate, "keeps an iterator of its own (kept)"),
    "stream": (
        lambda: DataLoader(Passes(), batch_size=8, num_workers=1, persistent_workers=True),
        "dataset.passes change",
    ),
}


@pytest.mark.parametrize(("loader", "named"), CHANGES.values(), ids=CHANGES)
def test_other_things_that_change_there_are_named(loader, named, tmp_path, caplog):
    train(Case(loader, steps=18), tmp_path, 1)
    assert len([record for record in caplog.records if named in record.getMessage()]) == 1


def test_the_newest_iterator_is_not_kept_for_all_epochs(tmp_path, caplog):
    loader = lambda: Newest(Augmented(), batch_size=BATCH, shuffle=True)  # noqa: E731
    check(Case(loader, at=(3, 8), steps=13), tmp_path)
    assert "iterator of its own" not in caplog.text


class Mapped(Augmented):
    """Opens its file when it is first needed, or for some samples anew."""

    def __init__(self, path, every=SAMPLES):
        super().__init__()
        self.path, self.every, self.file, self.shard = path, every, None, 0

    def __getitem__(self, index):
        if self.file is None or index // self.every != self.shard:
            self.shard = index // self.every
            self.file = np.memmap(self.path, np.float32, "r", offset=4 * self.shard)
        return super().__getitem__(index) + float(self.file[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [SAMPLES, 5])
def test_a_mapped_file_opened_when_it_is_needed_is_not_named_and_one_of_several_is(workers, every, tmp_path, caplog):
    path = tmp_path / "numbers"
    np.arange(SAMPLES, dtype=np.float32).tofile(path)
    train(Case(lambda: DataLoader(Mapped(path, every), batch_size=BATCH, num_workers=workers), steps=4), tmp_path, 1)
    assert ("dataset.file" in caplog.text) == (every < SAMPLES)


class Staged(Augmented):
    stage = 0

    def __getitem__(self, index):
        return super().__getitem__(index) + self.stage


class Stages(Callback):
    """Tells the dataset in this process which epoch it is, as curricula do."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.train_dataloader.dataset.stage = 3 * trainer.current_epoch + 1


def test_workers_begin_with_what_the_program_set_before_the_epoch(tmp_path):
    loader = lambda: DataLoader(Staged(), batch_size=BATCH, num_workers=2, sampler=range(SAMPLES))  # noqa: E731
    check(Case(loader, at=(6, 8), steps=13, callbacks=lambda: [Stages()]), tmp_path)


def test_generators_that_draw_the_same_go_on_so():
    image, mask = (SimpleNamespace(rng=np.random.RandomState(1)) for _ in range(2))
    other = SimpleNamespace(rng=np.random.RandomState(2))
    Watch(1, "batch").before(SimpleNamespace(dataset=[image, other, mask], collate_fn=None), 7)
    assert image.rng.random() == mask.rng.random() != other.rng.random()


MADE = (
    torch.Generator, random.Random, lambda: np.random.Generator(np.random.Philox(1)), np.random.RandomState,
    lambda: np.random.RandomState(np.random.PCG64(1)),
)  # fmt: skip


@pytest.mark.parametrize("make", MADE)
def test_every_kind_can_be_seeded(make):
    made, drawn = make(), []
    for seed in (2**64 - 1, 7, 2**64 - 1):
        reseed(made, seed)
        drawn.append(
            torch.rand(1, generator=made).item()
            if make is torch.Generator
            else made.random_sample()
            if hasattr(made, "random_sample")
            else made.random()
        )
    assert drawn[0] == drawn[2] != drawn[1]


class CountsItsSamples(Augmented):
    """Says itself that its count decides; there are new workers before they have counted for long."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __getitem__(self, index):
        self.count += 1
        return super().__getitem__(index) + self.count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class CountsBesideItsState(CountsItsSamples):
    """Notes what it has loaded, and has a state that says nothing of that."""

    def __getitem__(self, index):
        return super().__getitem__(index) - self.count

    def state_dict(self):
        return {"version": 1}


def test_what_a_dataset_notes_beside_its_state_is_not_named_at_once(tmp_path, caplog):
    train(Case(lambda: DataLoader(CountsBesideItsState(), batch_size=BATCH, num_workers=2), steps=2), tmp_path, 1)
    assert "in its worker processes" not in caplog.text


def test_what_a_dataset_with_a_state_changes_in_a_worker_is_named_at_once(tmp_path, caplog):
    train(Case(lambda: DataLoader(CountsItsSamples(), batch_size=BATCH, num_workers=2), steps=2), tmp_path, 1)
    assert "in its worker processes dataset.count change" in caplog.text
