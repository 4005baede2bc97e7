"""Loaders with worker processes: what they draw depends on the batch alone."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch
from exact.loaders.test_loaders import EagerStream, FlaggedStream, LazySampler, Stream
from exact.runs import BATCH, SAMPLES, Augmented, Case, check, shuffled, train
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from nemologger.errors import ConfigurationError
from nemologger.exact import port

AT = (1, 5, 6, 9)


class Sharded(Stream):
    """Each worker reads a part of it."""

    def __iter__(self):
        info = get_worker_info()
        yield from islice(super().__iter__(), info.id, None, info.num_workers)


class StatefulShard(FlaggedStream):
    """Each worker reads a part of it, and knows where it is."""

    def __iter__(self):
        info = get_worker_info()
        self.next, self.resume = self.resume or 0, None
        while self.next < self.samples:
            index, self.next = self.next, self.next + 1
            if index % info.num_workers == info.id:
                yield torch.full((4,), float(index)) + torch.rand(1) + np.random.rand() + random.random()


class NextPass(IterableDataset):
    """Comes to the end of a pass with its last sample already, and is then at the beginning of the next one."""

    def __init__(self, samples=SAMPLES):
        self.samples, self.next, self.passes = samples, 0, 0

    def __iter__(self):
        info = get_worker_info()
        while self.next < self.samples:
            index, self.next = self.next, self.next + 1
            if index % info.num_workers == info.id:
                yield torch.full((4,), index + self.passes / 2)
        self.next, self.passes = 0, self.passes + 1

    def state_dict(self):
        return {"next": self.next, "passes": self.passes}

    def load_state_dict(self, state):
        self.next, self.passes = state["next"], state["passes"]


def mine(worker):
    """A worker_init_fn of the user's."""
    get_worker_info().dataset.samples += worker - worker


def two(dataset, **options):
    return DataLoader(dataset, **{"batch_size": BATCH, "num_workers": 2, **options})


LOADERS = {
    "fork": lambda: shuffled(num_workers=2, worker_init_fn=mine),
    "persistent": lambda: shuffled(num_workers=2, persistent_workers=True),
    "spawn": lambda: shuffled(
        num_workers=1, multiprocessing_context="spawn", persistent_workers=True, worker_init_fn=mine
    ),
    "no batching": lambda: DataLoader(Augmented(6), batch_size=None, shuffle=True, num_workers=2),
    "lazy sampler": lambda: two(Augmented(), sampler=LazySampler(), persistent_workers=True),
    "stream": lambda: two(Sharded()),
    "persistent stream": lambda: two(EagerStream(12), persistent_workers=True),
    "stateful stream": lambda: two(StatefulShard(), persistent_workers=True),
    "at the beginning of the next pass": lambda: two(NextPass()),
    "persistent, at the beginning of the next pass": lambda: two(NextPass(), persistent_workers=True),
    "torchdata": lambda: StatefulDataLoader(Augmented(), batch_size=BATCH, shuffle=True, num_workers=2),
    "torchdata stream": lambda: StatefulDataLoader(StatefulShard(SAMPLES), batch_size=BATCH, num_workers=2),
}


@pytest.mark.parametrize("name", LOADERS)
def test_some_steps(name, tmp_path):
    at = (5,) if name == "spawn" else AT  # its workers take seconds to start
    check(Case(LOADERS[name], at=at, steps=13), tmp_path)


def test_workers_that_stay_go_on_in_a_stream_without_an_end(tmp_path):
    case = Case(lambda: two(NextPass(10**9), persistent_workers=True), trainer={"limit_train_batches": 3}, at=(3, 5))
    check(case, tmp_path)


class AnyShard(StatefulShard):
    """Also without workers."""

    def __iter__(self):
        info = get_worker_info()
        mine, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self.next, self.resume = self.resume or 0, None
        while self.next < self.samples:
            index, self.next = self.next, self.next + 1
            if index % workers == mine:
                yield torch.full((4,), float(index))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 0), (0, 2)])
def test_states_of_another_number_of_workers_are_refused_in_mid_epoch_and_named_at_its_end(
    before, after, tmp_path, caplog
):
    case = Case(lambda: two(AnyShard(), num_workers=before), steps=8)
    train(case, tmp_path, 1)
    assert "of its dataset in" not in caplog.text
    case.data = lambda: two(AnyShard(), num_workers=after)
    with pytest.raises(ConfigurationError, match=f"num_workers={after}.*set num_workers={before}"):
        train(case, tmp_path / "mid", 2, tmp_path / "step=2")
    losses, _, _ = train(case, tmp_path / "end", 2, tmp_path / "step=6")
    assert len(losses) == 2
    assert f"of its dataset in {before} workers, and there are {after} now" in caplog.text


def test_the_loader_for_the_state_of_workers_is_made_without_a_warning(recwarn):
    port.with_worker_state(DataLoader(range(4), num_workers=1))
    assert [str(warning.message) for warning in recwarn] == []
