"""Streams that are brought to their place by loading them once more, and those of libraries that say where they are."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from exact.runs import BATCH, SAMPLES, Augmented, Case, check, train
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler
from torchdata import nodes
from torchdata.stateful_dataloader import StatefulDataLoader

from nemologger.exact.loaders import replayed
from nemologger.exact.loaders.position import Mark, Position
from nemologger.exact.loaders.with_state import WithState
from nemologger.exact.values import contents


def row(index):
    return torch.sin(torch.arange(4.0) + index)


class ByTheClock(IterableDataset):
    """Shuffles with a generator of which nobody knows, as webdataset does without a seed."""

    def __iter__(self):
        yield from map(row, random.Random(time.time_ns()).sample(range(SAMPLES), SAMPLES))


class Steady(IterableDataset):
    def __iter__(self):
        yield from map(row, range(SAMPLES))


@pytest.mark.parametrize("changes", [True, False])
def test_other_batches_than_before_are_noticed(changes, tmp_path, caplog):
    case = Case(lambda: DataLoader(ByTheClock() if changes else Steady(), batch_size=BATCH), steps=5)
    train(case, tmp_path, 1)
    train(case, tmp_path / "more", 2, tmp_path / "step=3")
    assert ("not those that were trained on" in caplog.text) == changes


class Grown(IterableDataset):
    """Gives other samples than at first from the one with this index on."""

    def __init__(self, other_from):
        self.other_from = other_from

    def __iter__(self):
        yield from (row(index + 100 * (index >= self.other_from)) for index in range(40))


def test_one_batch_of_many_is_compared(tmp_path, caplog):
    streams = {other_from: Case(lambda o=other_from: DataLoader(Grown(o)), steps=35) for other_from in (40, 31)}
    streams[40].ckpt["every_n_train_steps"] = 34
    train(streams[40], tmp_path, 1)
    train(streams[31], tmp_path / "more", 2, tmp_path / "step=34")
    assert "not those that were trained on" in caplog.text


def test_each_batch_is_compared_that_takes_its_time(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("nemologger.exact.loaders.feed._SHARE", 1e9)
    streams = {other_from: Case(lambda o=other_from: DataLoader(Grown(o)), steps=22) for other_from in (40, 18)}
    streams[40].ckpt["every_n_train_steps"] = 21
    train(streams[40], tmp_path, 1)
    train(streams[18], tmp_path / "more", 2, tmp_path / "step=21")
    assert "not those that were trained on" in caplog.text


def test_checkpoints_of_earlier_versions_have_the_checksum_of_the_last_batch():
    plain = Position(Mark(None, 20, 0, False, 7, 16)).to_plain()
    assert Position.from_plain(plain).mark[-2:] == (7, 16)
    del plain["checked"]
    assert Position.from_plain(plain).mark[-2:] == (7, 20)


def test_a_long_way_is_told(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(replayed, "_SAY_EVERY", -1.0)
    case = Case(lambda: DataLoader(Steady(), batch_size=BATCH), steps=4)
    train(case, tmp_path, 1)
    with caplog.at_level("INFO"):
        train(case, tmp_path / "more", 2, tmp_path / "step=3")
    assert "once more to find the place: 2 of 3" in caplog.text


def test_a_batch_has_the_same_checksum_wherever_it_is_made():
    def batch(last):
        return {"x": torch.rand(3, 2000, generator=torch.Generator().manual_seed(1)).t(), "y": ["a", (1, None)],
                "z": SimpleNamespace(inner=[torch.tensor([1, last]), object()])}  # fmt: skip

    assert contents.of_batch(batch(2)) == contents.of_batch(batch(2)) != contents.of_batch(batch(3))


def test_of_a_large_batch_not_everything_is_looked_at():
    seen = []

    class Text(list):
        def __iter__(self):
            return (seen.append(item) or item for item in super().__iter__())

    contents.of_batch([Text(range(1000)) for _ in range(1000)])
    assert 0 < len(seen) <= 1024


class HuggingFace(IterableDataset):
    """As a stream of ``datasets`` does with states: it begins every epoch of the same number with the one it was given."""

    def __init__(self, buffer=0):
        self._epoch = torch.tensor(0).share_memory_()
        self._start, self._state = None, {"next": 0, "epoch": 0}
        self._ex_iterable = SimpleNamespace()
        self.buffer = buffer
        if buffer:
            self._ex_iterable.ex_iterable = type("BufferShuffledExamplesIterable", (), {})()

    def set_epoch(self, epoch):
        self._epoch += epoch - self._epoch

    def __iter__(self):
        epoch = int(self._epoch)
        self._state = {"next": 0, "epoch": epoch}
        if self._start and self._start["epoch"] == epoch:
            self._state["next"] = self._start["next"]
        buffer = []
        while self._state["next"] < SAMPLES:
            self._state["next"] += 1
            buffer.append(row(self._state["next"] + 50 * epoch))
            if len(buffer) > self.buffer:
                yield buffer.pop(random.randrange(len(buffer)))
        yield from buffer

    def state_dict(self):
        return dict(self._state)

    def load_state_dict(self, state):
        self._start = state


class Hugging(HuggingFace):
    """Of a library's class."""


HuggingFace.__module__, HuggingFace.__name__ = "datasets.iterable_dataset", "IterableDataset"


def numbering():
    from lightning.pytorch.callbacks import LambdaCallback

    return [LambdaCallback(on_train_epoch_start=lambda t, m: t.train_dataloader.dataset.set_epoch(t.current_epoch))]


STREAMS = {
    "no workers": (0, Hugging, list), "with epochs": (0, Hugging, numbering), "buffer": (0, lambda: Hugging(5), list),
    "workers that stay": (1, Hugging, numbering), "buffer in a worker": (1, lambda: Hugging(5), list),
}  # fmt: skip


@pytest.mark.parametrize(("workers", "stream", "callbacks"), STREAMS.values(), ids=STREAMS)
def test_streams_of_hugging_face(workers, stream, callbacks, tmp_path):
    loader = lambda: DataLoader(  # noqa: E731
        stream(), batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    check(Case(loader, at=(3, 6, 8), callbacks=callbacks), tmp_path)


class Mapped(HuggingFace):
    """Calls a function by batches."""

    def __init__(self):
        super().__init__()
        self._ex_iterable.ex_iterable = type("MappedExamplesIterable", (), {})()
        self._ex_iterable.ex_iterable.batched = True


def threaded():
    return nodes.Loader(nodes.Prefetcher(nodes.Batcher(nodes.IterableWrapper(map(row, range(SAMPLES))), BATCH), 2))


def mixed(kind=RandomSampler):
    """Begins the shorter of two sources again and again."""
    samplers = [kind(range(n)) for n in (5, SAMPLES)]
    sources = {str(i): nodes.Mapper(nodes.SamplerWrapper(sampler), row) for i, sampler in enumerate(samplers)}
    return nodes.Loader(nodes.Batcher(nodes.MultiNodeWeightedSampler(sources, {"0": 1.0, "1": 1.0}, seed=3), BATCH))


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (lambda: DataLoader(Mapped(), batch_size=BATCH), "called ahead"),
        (threaded, "a thread of its own loads"),
        (mixed, "the state of its MultiNodeWeightedSampler"),
    ],
)
def test_what_draws_ahead_of_its_state_is_named(loader, named, tmp_path, caplog):
    train(Case(loader, steps=2), tmp_path, 1)
    assert named in caplog.text


def test_nodes_that_are_mixed_in_order(tmp_path, caplog):
    check(Case(lambda: mixed(SequentialSampler), at=(3, 8)), tmp_path)
    assert "MultiNodeWeightedSampler" not in caplog.text


def test_workers_of_torchdata_that_stay_with_such_a_stream(tmp_path):
    loader = lambda: StatefulDataLoader(Hugging(), batch_size=BATCH, num_workers=1, persistent_workers=True)  # noqa: E731
    check(Case(loader, at=(3, 6)), tmp_path)


def noded(restart, by_epoch):
    if by_epoch:
        sampler = DistributedSampler(range(SAMPLES), num_replicas=1, rank=0)
    else:
        sampler = RandomSampler(range(SAMPLES), generator=torch.Generator().manual_seed(2))
    node = nodes.Mapper(
        nodes.Batcher(nodes.SamplerWrapper(sampler), BATCH), lambda some: torch.stack([*map(row, some)]) + torch.rand(1)
    )
    return nodes.Loader(node, restart_on_stop_iteration=restart)


@pytest.mark.parametrize(("restart", "by_epoch"), [(True, False), (False, False), (True, True)])
def test_loaders_made_of_nodes(restart, by_epoch, tmp_path):
    check(Case(lambda: noded(restart, by_epoch), at=(3, 5, 8)), tmp_path)


class AskedForMore(Steady):
    """As litdata's: its loader asks it for the state, with what it knows."""

    def state_dict(self, number, workers):
        return {"number": number}

    def load_state_dict(self, state):
        raise AssertionError


def test_a_state_that_takes_more_to_ask_for_is_none(tmp_path):
    check(Case(lambda: DataLoader(AskedForMore(), batch_size=BATCH), at=(3,)), tmp_path)


class Ahead(DataLoader):
    """Loads in a thread."""

    def __iter__(self):
        with ThreadPoolExecutor(1) as pool:
            batches = super().__iter__()
            while (batch := pool.submit(next, batches, None).result()) is not None:
                yield batch


@pytest.mark.parametrize(("loader", "named"), [(Ahead, True), (DataLoader, False)])
def test_a_thread_that_loads_ahead_is_named(loader, named, tmp_path, caplog):
    train(Case(lambda: loader(Augmented(), batch_size=BATCH), steps=2), tmp_path, 1)
    assert ("a thread of its own loads" in caplog.text) == named


class Sized(Steady):
    def __len__(self):
        return SAMPLES


class OfItsOwn(DataLoader):
    """A subclass that says where it is, and begins with its first batch, as litdata's does."""

    taken, skipped = 0, 0

    def __iter__(self):
        self.taken, self.skipped = self.skipped, 0
        for batch in islice(super().__iter__(), self.taken, None):
            self.taken += 1
            yield batch

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.skipped = state["taken"]


def test_a_subclass_with_a_state_that_begins_late(tmp_path):
    check(Case(lambda: OfItsOwn(Sized(), batch_size=BATCH), at=(3, 5)), tmp_path)


class InEpochs(IterableDataset):
    epoch = 0

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        yield from map(row, random.Random(self.epoch).sample(range(SAMPLES), SAMPLES))


class OfLitdata(DataLoader):
    """As litdata's: where it was resumed it begins again, until it has been asked for one batch more than there are."""

    epoch, taken, restore = 0, 0, False

    def __iter__(self):
        if not self.restore:
            self.epoch, self.taken = self.epoch + 1, 0
        self.dataset.epoch = self.epoch
        for batch in islice(super().__iter__(), self.taken, None):
            self.taken += 1
            yield batch
        self.restore = False

    def state_dict(self):
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state):
        self.epoch, self.taken, self.restore = state["epoch"], state["taken"], True


OfLitdata.__module__, OfLitdata.__name__ = "litdata.streaming.dataloader", "StreamingDataLoader"


def test_litdatas_loader_begins_each_epoch_anew(tmp_path):
    check(Case(lambda: OfLitdata(InEpochs(), batch_size=BATCH), at=(3, 5, 7)), tmp_path)


def test_litdatas_loader_begins_where_the_program_has_set_it(tmp_path):
    loader = OfLitdata(InEpochs(), batch_size=BATCH)
    loader.load_state_dict({"epoch": 1, "taken": 4})
    source = WithState(loader)
    first = list(source.begin(1, 0, None, lambda: None))
    loader.restore = True  # nobody has asked for one batch more
    assert len(list(source.begin(1, 0, None, lambda: None))) == len(first) + 4
    loader.restore = True
    source.release()
    assert not loader.restore


class CombinedStreamingDataset(InEpochs):
    pass


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_that_combine_streams_of_litdata_are_named(workers, tmp_path, caplog):
    stream = Case(lambda: OfLitdata(CombinedStreamingDataset(), batch_size=BATCH, num_workers=workers), steps=2)
    train(stream, tmp_path, 1)
    assert ("which dataset each worker takes the next sample of" in caplog.text) == bool(workers)
