"""Loaders that others put something around, as webdataset's WebLoader, and those that hold or go through themselves."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch
from exact.runs import BATCH, SAMPLES, Augmented, Case, check, train
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Subset

from nemologger.exact import port
from nemologger.exact.workers import end_workers


class Stream(IterableDataset):
    """Draws from every global generator for each sample."""

    def __iter__(self):
        samples = Augmented()
        yield from (samples[index] for index in range(SAMPLES))


class Numbered(Stream):
    """Counts its epochs, as shards of webdataset do that are drawn anew for each."""

    def __init__(self):
        self.epoch = -1

    def __iter__(self):
        self.epoch += 1
        yield from (sample + self.epoch for sample in super().__iter__())


class Around:
    """Has the loader as an attribute."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader


class Pipeline:
    """Has it as the first of several stages."""

    def __init__(self, loader):
        self.pipeline = [loader, lambda batches: (batch * 2 for batch in batches)]

    def __iter__(self):
        return self.pipeline[1](iter(self.pipeline[0]))


class Two(Around):
    """Has another one beside it."""

    def __init__(self, loader):
        super().__init__(loader)
        self.other = DataLoader(Stream(), batch_size=BATCH)

    def __iter__(self):
        yield from map(sum, zip(self.loader, self.other, strict=True))


class Within:
    """Says how many batches are out, and makes the loader of the others anew."""

    def __init__(self, dataset, **options):
        self.dataset, self.options = dataset, options
        self.epoch, self.batches = 0, 0

    def __iter__(self):
        order = random.Random(self.epoch).sample(range(SAMPLES), SAMPLES)
        rest = Subset(self.dataset, order[BATCH * self.batches :])
        for batch in DataLoader(rest, batch_size=BATCH, **self.options):
            self.batches += 1
            yield batch
        self.epoch, self.batches = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state):
        self.epoch, self.batches = state["epoch"], state["batches"]


class Plain(Augmented):
    """Draws nothing."""

    def __getitem__(self, index):
        return torch.sin(torch.arange(4.0) + index)


class StreamWithin(Within, IterableDataset):
    pass


@pytest.mark.parametrize(
    "data", [lambda: Within(Augmented()), lambda: DataLoader(StreamWithin(Augmented()), batch_size=None)]
)
def test_one_with_a_state_whose_loader_begins_with_the_first_batch(data, tmp_path, caplog):
    check(Case(data, at=(3, 8)), tmp_path)
    assert "begins within it" not in caplog.text


class LoadsWithin(Plain):
    def __getitem__(self, index):
        return next(iter(DataLoader(range(index, SAMPLES))))


def test_loaders_of_a_worker_are_not_taken_for_that_of_the_stream():
    begun = torch.zeros(1).share_memory_()
    with port.first_index_within(None, lambda batches: begun.add_(1)):
        assert len(list(DataLoader(LoadsWithin(), batch_size=BATCH, num_workers=1))) == 6
    assert begun == 1


class Skips(Within):
    """Draws the order of the number of the epoch, and goes past what is out already."""

    def __iter__(self):
        batches = DataLoader(self.dataset, batch_size=BATCH, sampler=self.sampler())
        for batch in islice(batches, self.batches, None):
            self.batches += 1
            yield batch
        self.epoch, self.batches = self.epoch + 1, 0

    def sampler(self):
        return RandomSampler(self.dataset, generator=torch.Generator().manual_seed(self.epoch))


class SkipsAsRanksDo(Skips):
    def sampler(self):
        sampler = DistributedSampler(self.dataset, num_replicas=1, rank=0)
        sampler.set_epoch(self.epoch)
        return sampler


@pytest.mark.parametrize("kind", [Skips, SkipsAsRanksDo])
def test_an_order_that_is_drawn_of_the_number_of_the_epoch_is_not_named(kind, tmp_path, caplog):
    check(Case(lambda: kind(Plain()), at=(3, 8)), tmp_path)
    assert "begins within it" not in caplog.text


def test_what_workers_of_such_a_loader_draw_is_named(tmp_path, caplog):
    train(Case(lambda: Within(Augmented(), num_workers=1), steps=2), tmp_path, 1)
    assert caplog.text.count("training loader Within: a DataLoader begins within it with the first batch") == 1


@pytest.fixture
def make():
    """Makes loaders, and ends their workers."""
    made = []

    def loader(dataset, workers, stays):
        shuffle = isinstance(dataset, Augmented)
        made.append(
            DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=stays, shuffle=shuffle)
        )
        return made[-1]

    yield loader
    for one in made:
        end_workers(one)


KINDS = {
    "stream": (Around, Stream, 1, True), "stages": (Pipeline, Stream, 2, True), "by index": (Around, Augmented, 2, True),
    "new workers": (Pipeline, Augmented, 1, False), "no workers": (Pipeline, Stream, 0, False),
    "two": (Two, Stream, 1, False),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "dataset", "workers", "stays"), KINDS.values(), ids=KINDS)
def test_a_loader_within_another(kind, dataset, workers, stays, make, tmp_path, caplog):
    check(Case(lambda: kind(make(dataset(), workers, stays)), at=(3, 6, 8)), tmp_path)
    assert "in its worker processes" not in caplog.text


def test_what_its_workers_keep_from_epoch_to_epoch_is_named(make, tmp_path, caplog):
    train(Case(lambda: Pipeline(make(Numbered(), 1, True)), steps=14), tmp_path, 1)
    assert "in its worker processes dataset.epoch change" in caplog.text


class Listed(Augmented):
    """Finds its samples in a list, where a number that is none of theirs shows."""

    def __getitem__(self, index):
        return super().__getitem__(range(SAMPLES)[index])


@pytest.mark.parametrize("dataset", [Listed, Stream])
def test_workers_that_began_before_training(dataset, make, tmp_path):
    def looked_at():
        loader = make(dataset(), 1, True)
        next(iter(loader))
        torch.manual_seed(1)
        return loader

    check(Case(looked_at, at=(3, 8)), tmp_path)


class Bound(DataLoader):
    """Is reached from its own collate_fn, as those of torch_geometric are."""

    def __init__(self, dataset, **options):
        super().__init__(dataset, collate_fn=self.stacked, **options)

    def stacked(self, samples):
        return torch.stack(samples)


def test_what_workers_are_prepared_by_is_nobody_elses_state(tmp_path, caplog):
    train(Case(lambda: Bound(Augmented(), batch_size=BATCH, num_workers=1), steps=3), tmp_path, 1)
    assert "has changed since training began" not in caplog.text


class ItsOwnIterator:
    """Has no state_dict(), counts its epochs, and makes an order when it is asked to begin."""

    def __init__(self):
        self.place, self.epoch, self.order = 0, 0, None

    def __iter__(self):
        if self.order is None:
            self.order = random.Random(self.epoch).sample(range(SAMPLES), 6)
        return self

    def __next__(self):
        if self.place == len(self.order):
            self.place, self.epoch, self.order = 0, self.epoch + 1, None
            raise StopIteration
        self.place += 1
        return torch.sin(torch.arange(4.0) + self.order[self.place - 1] + 30 * self.epoch)


def test_an_order_that_is_made_when_it_is_needed(tmp_path):
    check(Case(ItsOwnIterator, at=(3, 7, 8, 10)), tmp_path)
