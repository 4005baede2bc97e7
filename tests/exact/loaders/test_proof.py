"""Streams whose state does not say in which order their samples come."""

import queue
import random
import threading

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from exact.runs import BATCH, SAMPLES, Case, check, check_chain, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from nemologger.exact.loaders.moment import Moment
from nemologger.exact.loaders.position import FRESH, Position
from nemologger.exact.loaders.proof import Proofs

NOT_BACK = "its state does not bring it back"
NOT_TRIED = "whether its state brings it back could not be tried"


def by_torch(stream):
    return torch.randperm(SAMPLES).tolist()


def by_numpy(stream):
    return np.random.permutation(SAMPLES)


def by_python(stream):
    return random.sample(range(SAMPLES), SAMPLES)


def by_its_own(stream):
    return stream.rng.permutation(SAMPLES)


def in_order(stream):
    return range(SAMPLES)


class Ordered(IterableDataset):
    """Its state says how many samples are out."""

    def __init__(self, order, noise=lambda: 0.0):
        self.order, self.noise = order, noise
        self.taken, self.rng = 0, np.random.default_rng(3)

    def __iter__(self):
        order = self.order(self)
        while self.taken < SAMPLES:
            self.taken += 1
            yield torch.full((4,), float(order[self.taken - 1])) + self.noise()
        self.taken = 0

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class InShards(Ordered):
    """Draws an order for each shard of eight samples."""

    shard = 0

    def __iter__(self):
        while self.shard < 4:
            order = torch.randperm(8).tolist()
            while self.taken < 8:
                self.taken += 1
                yield torch.full((4,), 8.0 * self.shard + order[self.taken - 1])
            self.taken, self.shard = 0, self.shard + 1
        self.shard = 0

    def state_dict(self):
        return {**super().state_dict(), "shard": self.shard}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.shard = state["shard"]


class SizedOrdered(Ordered):
    def __len__(self):
        return SAMPLES


class Own:
    """No DataLoader."""

    def __init__(self):
        self.stream = Ordered(by_torch)

    def __iter__(self):
        return (sample[None] for sample in self.stream)

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)


def of(stream, **options):
    return DataLoader(stream, batch_size=BATCH, **options)


def of_torchdata(**options):
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Ordered(by_torch), batch_size=BATCH, **options)


def now_and_then():
    return np.random.rand() if random.random() < 0.2 else 0.0


EXACT = {
    "torch": Case(lambda: of(Ordered(by_torch)), at=(1, 2, 5, 8)),
    "numpy": Case(lambda: of(Ordered(by_numpy)), at=(3, 7)),
    "python": Case(lambda: of(Ordered(by_python)), at=(3, 7)),
    "a generator of its own": Case(lambda: of(Ordered(by_its_own)), at=(3, 7)),
    "others for samples": Case(lambda: of(Ordered(by_numpy, lambda: torch.rand(1))), at=(3, 7)),
    "a length": Case(lambda: of(SizedOrdered(by_torch)), at=(3, 8)),
    "torchdata's": Case(of_torchdata, at=(3, 7)),
    "no DataLoader": Case(Own, at=(3, 8)),
    "workers": Case(lambda: of(Ordered(by_torch), num_workers=2), at=(1, 2, 5, 7)),
    "torchdata's, workers": Case(lambda: of_torchdata(num_workers=2), at=(3,)),
    "torchdata's, workers that seldom say where they are": Case(
        lambda: of_torchdata(num_workers=2, snapshot_every_n_steps=5), at=(6,)
    ),
    "for samples alone": Case(lambda: of(Ordered(in_order, lambda: torch.rand(1))), at=(1, 3)),
    "for some samples alone": Case(lambda: of(Ordered(in_order, now_and_then)), at=(2, 5, 8)),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_order_drawn_with_the_first_batch_is_drawn_again(name, tmp_path, caplog):
    check(EXACT[name], tmp_path)
    assert NOT_BACK not in caplog.text
    assert NOT_TRIED not in caplog.text


@pytest.mark.parametrize("stream", [lambda: Ordered(by_torch, lambda: torch.rand(1)), lambda: InShards(by_torch)])
def test_another_order_is_named_when_training_goes_on(stream, tmp_path, caplog):
    case = Case(lambda: of(stream()), steps=6)
    train(case, tmp_path, 1)
    assert NOT_BACK not in caplog.text
    train(case, tmp_path / "again", 2, tmp_path / "step=4")
    assert caplog.text.count(f"training loader DataLoader: {NOT_BACK}") == 1


class Noting(Ordered):
    """Counts what its state does not have."""

    passes, opened = 0, 0

    def __iter__(self):
        self.passes += 1
        self.opened += 1
        for sample in super().__iter__():
            yield sample + self.passes + self.opened


def test_a_stream_is_as_it_was_when_that_has_been_looked_at(tmp_path):
    check(Case(lambda: of(Noting(by_torch)), at=(3, 5)), tmp_path)


class Keeping(Ordered):
    """Goes on in the very dictionary that it is given, and that it gives away."""

    def __init__(self):
        super().__init__(in_order)
        self.state = {"taken": 0}

    def __iter__(self):
        while self.state["taken"] < SAMPLES:
            self.state["taken"] += 1
            yield torch.full((4,), float(self.state["taken"]))
        self.state["taken"] = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_a_stream_may_change_the_state_that_it_was_given(tmp_path, caplog):
    check_chain(Case(lambda: of(Keeping()), at=(2, 3, 6, 7, 9)), tmp_path)
    assert NOT_BACK not in caplog.text


class InThread(Own):
    """A thread goes through the stream, and goes on when nobody asks for batches any more."""

    def __init__(self):
        self.stream, self.out = Ordered(in_order), {"taken": 0}

    def __iter__(self):
        ready = queue.Queue(2)

        def fill():
            for sample in self.stream:
                ready.put((sample[None], self.stream.state_dict()))
            ready.put(None)

        threading.Thread(target=fill, name="fills", daemon=True).start()
        while (made := ready.get()) is not None:
            batch, self.out = made
            yield batch

    def state_dict(self):
        return self.out


def test_a_stream_with_a_thread_is_not_tried(tmp_path):
    train(Case(InThread, steps=6), tmp_path, 1)
    train(Case(InThread, steps=7), tmp_path / "again", 2, tmp_path / "step=5")
    assert [thread.name for thread in threading.enumerate()].count("fills") == 2  # each run has left one behind


class Fleeting(SizedOrdered):
    """What has been read is gone; and in the middle of an epoch it may have no state."""

    gone = 0
    asked = False

    def load_state_dict(self, state):
        if state["taken"] < self.gone:
            raise RuntimeError("gone")
        super().load_state_dict(state)

    def state_dict(self):
        if self.asked and 0 < self.taken < SAMPLES:
            raise RuntimeError("in the middle")
        return super().state_dict()


def test_training_goes_on_where_only_what_was_noted_is_gone(tmp_path, caplog, monkeypatch):
    case = Case(lambda: of(Fleeting(in_order)), steps=6)
    losses, _, _ = train(case, tmp_path, 1)
    monkeypatch.setattr(Fleeting, "gone", 4 * BATCH + 1)
    again, _, _ = train(case, tmp_path / "again", 2, tmp_path / "step=5")
    assert again == losses[5:]
    assert NOT_BACK in caplog.text


def test_training_needs_no_state_where_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(Fleeting, "asked", True)
    case = Case(lambda: of(Fleeting(in_order)), steps=6, ckpt={"every_n_train_steps": 6})
    assert len(train(case, tmp_path, 1)[0]) == 6


class SavesFirst(pl.Callback):
    """Saves when the first step of the second epoch is under way."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_an_epoch_that_is_repeated_from_its_first_batch_is_noted_too(tmp_path):
    path = tmp_path / "first.ckpt"
    case = Case(lambda: of(SizedOrdered(by_torch)), steps=11, callbacks=lambda: [SavesFirst(path)])
    losses, _, _ = train(case, tmp_path / "straight", 1)
    train(case, tmp_path / "again", 2, path, stop_at=9)
    again, _, _ = train(case, tmp_path / "third", 3, tmp_path / "again" / "step=9")
    assert again == losses[9:]


class StreamingDataLoader(DataLoader):
    """As MosaicML's: a state of an epoch that has begun somewhere on this machine already is left out as old."""

    epochs, given = [0], None

    def __iter__(self):
        epoch, taken = self.given or (self.epochs[0], 0)
        if epoch < self.epochs[0]:
            epoch, taken = self.epochs[0], 0
        self.given, self.epochs[0] = None, epoch + 1
        order = np.random.default_rng(epoch).permutation(SAMPLES)
        for self.out in range(taken, SAMPLES):
            self.epoch = epoch
            yield torch.full((1, 4), float(order[self.out]))

    def state_dict(self):
        return {"epoch": self.epoch, "taken": self.out + 1}

    def load_state_dict(self, state):
        self.given = state["epoch"], state["taken"]


StreamingDataLoader.__module__ = "streaming.base.dataloader"


def test_a_stream_that_counts_epochs_where_all_processes_see_it_is_not_tried(tmp_path, monkeypatch):
    case = Case(lambda: StreamingDataLoader(Ordered(in_order)), steps=12)
    monkeypatch.setattr(StreamingDataLoader, "epochs", (first := [0]))
    losses, _, _ = train(case, tmp_path, 1)
    first[0] = 0
    assert train(case, tmp_path / "again", 2, tmp_path / "step=5")[0] == losses[5:]


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["python", "numpy", "torch", "own"]), max_size=6))
def test_what_moved_is_found_and_set_back(draws):
    roots = {"stream": Ordered(in_order)}
    draw = {
        "python": random.random, "numpy": np.random.rand, "torch": lambda: torch.rand(1), "own": roots["stream"].rng.random,
    }  # fmt: skip
    before = Moment.of(roots)
    kept = Moment.from_plain(before.to_plain())
    first = [draw[name]() for name in draws]
    moved = Moment.of(roots).moved_since(kept)
    assert {name.replace("stream.rng", "own") for name in moved} == set(draws)
    kept.restore(roots, moved)
    assert Moment.of(roots).moved_since(before) == set()
    assert [draw[name]() for name in draws] == first


class Large(Ordered):
    def __init__(self):
        super().__init__(in_order)
        self.buffer = torch.zeros(2**22 + 1)

    def state_dict(self):
        return {**super().state_dict(), "buffer": self.buffer}


def test_a_large_state_is_in_a_checkpoint_once(tmp_path):
    train(Case(lambda: of(Large()), steps=5, ckpt={"every_n_train_steps": 5}), tmp_path, 1)
    size = sum(file.stat().st_size for file in (tmp_path / "step=5").rglob("*") if file.is_file())
    assert 2**24 < size < 1.5 * 2**24


@pytest.mark.parametrize(
    ("make", "step"), [(lambda: of(SizedOrdered(by_torch)), 1), (InThread, 3), (lambda: of(Large()), 3)]
)
def test_where_nothing_can_be_tried_that_is_said(make, step, tmp_path, caplog):
    case = Case(make, steps=4)
    train(case, tmp_path, 1)
    assert NOT_TRIED not in caplog.text
    train(case, tmp_path / "again", 2, tmp_path / f"step={step}")
    assert caplog.text.count(NOT_TRIED) == 1


def test_few_batches_of_a_long_epoch_are_noted():
    noted = []

    def place():
        noted.append(Position(FRESH))
        return noted[-1]

    proofs = Proofs({}, 0)
    proofs.begin()
    batches = iter(range(1000))
    for count in range(1000):
        proofs.take(batches, count, place)
    assert 10 < len(noted) < 30
