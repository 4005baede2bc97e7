"""What training itself changes in a sampler, in the middle of an epoch."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from exact.runs import BATCH, SAMPLES, Augmented, Case, Net, check, check_chain, train
from torch.utils.data import BatchSampler, DataLoader, Sampler, WeightedRandomSampler

from nemologger.exact.loaders import drawn
from nemologger.exact.loaders.position import Mark, Position, rescaled


class Numbered(Augmented):
    """Says which sample it is."""

    def __getitem__(self, index):
        return torch.cat([torch.tensor([float(index)]), super().__getitem__(index)])


class Hard(Sampler):
    """Takes samples by weight; counts what it draws, and by which rule. Some draw one index at a time."""

    def __init__(self, lazy):
        self.lazy, self.weights, self.drawn, self.rule, self.seen = lazy, torch.ones(SAMPLES), 0, 1.0, {}

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        order = iter(torch.multinomial(self.weights**self.rule, SAMPLES, replacement=True).tolist())
        for _ in range(SAMPLES):
            self.drawn += 1
            yield int(torch.multinomial(self.weights, 1)) if self.lazy else (next(order) + self.drawn // 20) % SAMPLES


class Stateful(Hard):
    """Nobody asks a sampler for its state: what it keeps is what counts."""

    def state_dict(self):
        return {"weights": self.weights.clone()}

    def load_state_dict(self, state):
        self.weights = state["weights"].clone()


class Rejecting(Hard):
    """Draws until a sample is taken: as often as its weight says."""

    def __iter__(self):
        drawn = 0
        while drawn < SAMPLES:
            index = random.randrange(SAMPLES)
            if random.random() < self.weights[index] / self.weights.max():
                drawn += 1
                yield index


class Counting(Hard):
    """Counts epochs when one is over, which is before training comes to its end."""

    def __iter__(self):
        yield from torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.drawn)).tolist()
        self.drawn += 1


class Easy(Hard):
    """Leaves out what is too hard, and knows its place only by where it is in its code."""

    def __iter__(self):
        for index in SAMPLES * list(range(12)):
            if self.weights[index] < 3 or index > 9:
                yield index


class Mines(Net):
    """Gives samples with a high loss a high weight."""

    def training_step(self, batch, batch_idx):
        loss = self.note(self.loss(batch[:, 1:]))
        loader = self.trainer.train_dataloader
        hard = (
            loader.sampler if isinstance(loader.sampler, Hard | WeightedRandomSampler) else loader.batch_sampler.sampler
        )
        hard.weights[batch[:, 0].long()] += loss.item()
        if isinstance(hard, Hard):
            hard.rule = 1.0 if self.global_step % 8 > 4 else 2.0  # what it was at first, too
            hard.seen[str(self.global_step)] = loss.item()
        return loss


def hard(lazy=False, batches=False, kind=Hard, data=Numbered, **options):
    sampler = kind(lazy)
    given = (
        {"batch_sampler": BatchSampler(sampler, BATCH, False)} if batches else {"sampler": sampler, "batch_size": BATCH}
    )
    return DataLoader(data(), **given, **options)


def weighted():
    return DataLoader(Numbered(), batch_size=BATCH, sampler=WeightedRandomSampler(torch.ones(SAMPLES), SAMPLES))


CASES = {
    "weights": Case(hard, Mines),
    "one by one": Case(lambda: hard(lazy=True), Mines),
    "in a batch sampler": Case(lambda: hard(batches=True), Mines),
    "of torch": Case(weighted, Mines),
    "with a state_dict()": Case(lambda: hard(kind=Stateful), Mines, at=(2, 5)),
    "of another number of draws": Case(lambda: hard(kind=Rejecting), Mines, at=(2, 5, 9)),
    "workers": Case(lambda: hard(num_workers=2), Mines, at=(2, 5, 6, 9)),
    "workers, one by one": Case(lambda: hard(lazy=True, num_workers=2), Mines, at=(2, 5, 9)),
    "workers, to the end": Case(lambda: hard(kind=Counting, num_workers=2, drop_last=True), Mines, at=(2, 4, 9)),
    "workers that stay": Case(lambda: hard(num_workers=2, persistent_workers=True), Mines, at=(2, 5, 6, 9)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sampler_that_training_changes_goes_on_as_it_was(case, tmp_path):
    check(case, tmp_path)


def test_also_when_a_run_is_stopped_after_every_step(tmp_path):
    check_chain(CASES["weights"], tmp_path)


class Plain(Numbered):
    """Draws nothing, so that it does not matter who loads it."""

    def __getitem__(self, index):
        return torch.sin(torch.arange(5.0) + index) * (torch.arange(5) > 0) + index * (torch.arange(5) == 0)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2), (2, 1)])
def test_also_with_another_number_of_workers(before, after, tmp_path, caplog):
    case = Case(lambda: hard(data=Plain, num_workers=before), Mines, steps=9)
    straight, _, _ = train(case, tmp_path, 1)
    case.data = lambda: hard(data=Plain, num_workers=after)
    losses, _, _ = train(case, tmp_path / "more", 2, tmp_path / "step=2")
    assert losses == straight[2:]
    assert ("its samples were loaded" in caplog.text) == (0 in (before, after) and before != after)
    assert "its sampler" not in caplog.text


@pytest.mark.parametrize("lazy", [True, False])
def test_what_another_number_of_workers_draws_ahead_is_named_if_it_is_drawn_one_by_one(lazy, tmp_path, caplog):
    case = Case(lambda: hard(lazy, num_workers=2), Mines, steps=5)
    train(case, tmp_path, 1)
    case.data = lambda: hard(lazy, num_workers=1)
    train(case, tmp_path / "more", 2, tmp_path / "step=3")
    assert ("it draws 2 batches ahead of training now, and drew 4 then" in caplog.text) == lazy


@pytest.mark.parametrize("lazy", [True, False])
def test_what_workers_were_told_ahead_is_named_if_it_is_too_large_to_be_saved(lazy, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(drawn, "_MOST", 8)
    case = Case(lambda: hard(lazy, num_workers=2), Mines, steps=5)
    train(case, tmp_path, 1)
    train(case, tmp_path / "more", 2, tmp_path / "step=3")
    assert ("had been told to load ahead could not be saved" in caplog.text) == lazy


@pytest.mark.parametrize("kind", [Hard, Easy])
def test_a_place_among_samples_that_training_leaves_out_is_named(kind, tmp_path, caplog):
    case = Case(lambda: hard(True, kind=kind), Mines, steps=6)
    train(case, tmp_path, 1)
    train(case, tmp_path / "more", 2, tmp_path / "step=5")
    assert ("goes on at another place of their order" in caplog.text) == (kind is Easy)


class Lazy(Sampler):
    """Goes through an order that it makes in place, by a number of its own; a list may hold what nobody keeps."""

    def __init__(self, samples, make):
        self.order, self.at, self.make, self.made = list(range(samples)), samples, make, []

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        random.shuffle(self.order)
        self.at = 0
        self.made = [self.make()]
        while self.at < len(self):
            self.at += 1
            yield self.order[self.at - 1]


def lazy(samples=SAMPLES, make=SimpleNamespace, **options):
    data = torch.arange(4.0 * samples).sin().view(samples, 4)
    return DataLoader(data, batch_size=BATCH, sampler=Lazy(samples, make), **options)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (1, 0), (0, 1), (2, 1)])
def test_what_a_sampler_makes_when_an_epoch_begins_is_made_again(before, after, tmp_path, caplog):
    """Also with another number of workers, which are told of more or fewer samples ahead."""
    case = Case(lambda: lazy(num_workers=before), steps=5)
    straight, _, _ = train(case, tmp_path, 1)
    case.data = lambda: lazy(num_workers=after)
    losses, _, _ = train(case, tmp_path / "more", 2, tmp_path / "step=2")
    assert losses == straight[2:]
    assert ("its samples were loaded" in caplog.text) == (0 in (before, after) and before != after)
    assert "its sampler" not in caplog.text


def test_a_sampler_of_fewer_samples_is_not_set_to_its_order_of_before(tmp_path):
    case = Case(lambda: lazy(make=int), steps=5)
    train(case, tmp_path, 1)
    case.data = lambda: lazy(10, make=int)
    losses, _, _ = train(case, tmp_path / "more", 2, tmp_path / "step=2")
    assert len(losses) == 3


def test_the_place_in_a_sampler_is_none_on_another_number_of_ranks():
    mark = Mark(None, 4, 0, False)
    assert rescaled(Position(mark, sizes=[22, 6, 0]), 2, 1).sizes is None


@pytest.mark.parametrize("reach", [2, 4])
def test_of_a_checkpoint_that_does_not_say_so_numbers_tell_whether_a_sampler_had_ended(reach):
    sampler = Counting(False)
    indices = iter(sampler)
    position = Position.from_plain({name: value for name, value in _of_workers().items() if name != "ahead"})
    ahead = position.drawn().again(indices, SAMPLES - 2, {}, "", reach)
    assert (len(ahead), sampler.drawn) == (2, reach == 4)
    assert Position.from_plain(_of_workers()).drawn().ended is False


def _of_workers():
    return Position(Mark(None, SAMPLES - 2, 0, False, checked=SAMPLES)).to_plain()
