"""Objects that a module holds, with lists and dictionaries in them."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from exact.runs import Case, Net, check, shuffled, train


class Replay:
    """Samples of earlier batches, and where the next one goes."""

    def __init__(self, keep):
        self.keep, self.samples, self.next = keep, [], 0

    def push(self, sample):
        if len(self.samples) < 12:
            self.samples.append(None)
        self.samples[self.next] = self.keep(sample)
        self.next = (self.next + 1) % 12


class Replays(Net):
    def __init__(self, keep):
        super().__init__()
        self.replay = Replay(keep)

    def training_step(self, batch, batch_idx):
        for sample in batch:
            self.replay.push(sample)
        again = [sample if isinstance(sample, torch.Tensor) else sample.x for sample in self.replay.samples]
        return self.note(self.loss([batch, torch.stack(random.sample(again, 2))]))


def test_a_buffer_of_samples_goes_on_as_it_was(tmp_path):
    check(Case(shuffled, lambda: Replays(lambda sample: sample), at=[1, 4, 7]), tmp_path)


def test_one_that_cannot_be_kept_begins_anew_as_a_whole_and_is_named(tmp_path, caplog):
    case = Case(shuffled, lambda: Replays(lambda sample: SimpleNamespace(x=sample)), steps=5)
    train(case, tmp_path, 1)
    losses, _, _ = train(case, tmp_path / "again", 2, tmp_path / "step=3")  # not at its end, which is not there
    assert len(losses) == 2
    for name in ("samples", "next"):
        assert f"module.replay.{name} has changed since training began, and is not saved" in caplog.text


class Loss(dict):
    @property
    def loss(self):
        return self["loss"]


class Curriculum:
    """How hard it is, and whom it has told of each step."""

    def __init__(self):
        self.level, self.told = 1.0, []

    def weight(self, loss):
        self.level *= 0.9
        self.told.append(lambda: None)
        return self.level


class Surprise:
    """By how much a loss is another one than the last."""

    def __init__(self):
        self.last = None

    def weight(self, loss):
        before, self.last = self.last, Loss(loss=loss)
        return 1.0 if before is None else 1.0 + abs(loss - before.loss)


class Weighs(Net):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return self.note(loss * self.by.weight(loss.item()))


def test_a_list_that_cannot_be_kept_takes_no_number_with_it_that_is_no_place_in_it(tmp_path, caplog):
    check(Case(shuffled, lambda: Weighs(Curriculum()), at=[2, 8]), tmp_path)
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "module.by" in r.message]


def test_a_dictionary_of_somebodys_class_that_was_not_there_at_first_is_not_made_as_a_plain_one(tmp_path):
    case = Case(shuffled, lambda: Weighs(Surprise()), steps=5)
    train(case, tmp_path, 1)
    losses, _, _ = train(case, tmp_path / "more", 2, tmp_path / "step=3")
    assert len(losses) == 2


class InSlots:
    """How hard it is, losses it has seen, and the last of them, which is not there at first."""

    __slots__ = ("last", "level", "seen")

    def __init__(self):
        self.level, self.seen = 1.0, [0.0]

    def weight(self, loss):
        self.level *= 0.9
        self.seen[0] += loss
        self.last = 0.5 * getattr(self, "last", 0.0) + loss
        return self.level + self.seen[0] + self.last


@dataclass(slots=True, frozen=True)
class Frozen:
    level: float = 1.0
    by: InSlots = field(default_factory=InSlots)

    def weight(self, loss):
        object.__setattr__(self, "level", self.level * 0.9)
        return self.level + self.by.weight(loss)


def test_what_is_in_slots_goes_on(tmp_path):
    check(Case(shuffled, lambda: Weighs(Frozen()), at=[2, 7]), tmp_path)


class Narrows(Net):
    """Its noise becomes less: one distribution is changed in place, another is made anew when an epoch begins."""

    def __init__(self):
        super().__init__()
        self.noise = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
        self.of_epoch = torch.distributions.Beta(2.0, 2.0)

    def on_train_epoch_start(self):
        self.of_epoch = torch.distributions.Beta(2.0 + self.current_epoch, 2.0)

    def training_step(self, batch, batch_idx):
        self.noise.scale *= 0.9
        self.passing = torch.distributions.Normal(self.net(batch), 1.0)
        return self.note(self.loss(batch + self.noise.sample()) * (1 + self.of_epoch.sample()))


def test_distributions_of_torch_go_on_as_they_were(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check(Case(shuffled, Narrows, at=[3, 8]), tmp_path)
    assert "exact resume, attribute" not in caplog.text
