"""What a module only notes begins anew in each life; what it goes on with goes on."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train
from torch.optim.lr_scheduler import LambdaLR

from nemologger.exact.program.records import Records
from nemologger.exact.program.uses import Uses


class Weighs(Net):
    """Everything in it that a loss depends on is in lists and dictionaries of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [1.0, 2.0]
        self.averages: dict[str, torch.Tensor] = {}
        self.counts: Counter[int] = Counter()
        self.window: deque[float] = deque(maxlen=4)
        self.memory: list[Any] = []
        self.place = 0
        self.outputs: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch) * self.weights[0]
        number = loss.item()
        self.weights[0] = 0.9 * self.weights[0] + 0.1 * min(number, 2.0)
        for name, value in self.net.named_parameters():
            before = self.averages.get(name, value.detach())
            self.averages[name] = 0.9 * before + 0.1 * value.detach()
        self.counts[int(10 * number) % 3] += 1
        self.window.append(number)
        if len(self.memory) < 5:
            self.memory.append(None)
        self.memory[self.place] = (batch[0], number)
        self.place = (self.place + 1) % 5
        self.outputs.append(loss.detach())
        pull = sum((value - self.averages[name]).pow(2).sum() for name, value in self.net.named_parameters())
        rest = 1 + self.counts[0] / 10 + sum(self.window) / 10 + self.memory[-1][1] / 10 + sum(self.outputs) / 10
        return self.note(loss * rest + pull)

    def on_train_epoch_end(self) -> None:
        self.outputs.clear()


def test_lists_that_decide_about_losses_go_on(tmp_path):
    check(Case(shuffled, Weighs, at=[2, 3, 5, 7]), tmp_path)


class MadeLate(Net):
    """Has its lists from the hook that starts training, which begins anew with what is within."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, list[torch.Tensor]] | None = None
        self.last = [[torch.zeros(1)]]

    def on_train_start(self) -> None:
        self.outputs = defaultdict(list) if self.outputs is None else self.outputs
        self.last[0].clear()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.outputs["loss"].append(loss.detach())
        self.last[0] = [*self.last[0], loss.detach()][-2:]
        return self.note(loss * (1 + sum(self.outputs["loss"]) / 10 + sum(self.last[0])))


def test_lists_that_are_made_when_training_starts_go_on(tmp_path):
    check(Case(shuffled, MadeLate, at=[3, 8]), tmp_path)


class Averages(Net):
    """Empties a list of numbers at the end of each epoch, which weighs what comes then."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[float] = []
        self.others: list[float] = []
        self.weight = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch) * self.weight
        self.outputs.append(loss.item())
        self.others.append(loss.item())
        return self.note(loss)

    def on_train_epoch_end(self) -> None:
        self.weight = sum(self.outputs) / len(self.outputs) + sum(self.others) / len(self.others)
        self.outputs.clear()
        self.others = []


def test_numbers_of_an_epoch_go_on_within_it_and_at_its_end(tmp_path):
    check(Case(shuffled, Averages), tmp_path)


def hardest(losses: list[float]) -> float:
    return max(losses, default=0.0)


def rows_noted(module: pl.LightningModule) -> int:
    return len(module.rows)


class LooksBack(Net):
    """Weighs a loss with lists and dictionaries that it only adds to: here, in a method, a helper, a function within."""

    def __init__(self) -> None:
        super().__init__()
        self.past: list[float] = []
        self.by_name: dict[str, list[float]] = defaultdict(list)
        self.of_batch: dict[int, float] = {}
        self.steps: set[int] = set()
        self.rows: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        loss = loss * (1 + self.lately + hardest(self.past) + rows_noted(self) / 10 + self.noted())
        self.past.append(loss.item() % 1)
        self.by_name["loss"].append(loss.item() % 1)
        self.of_batch[self.global_step] = loss.item() % 1
        self.steps.add(self.global_step)
        self.rows += [{"loss": loss.item()}]
        return self.note(loss)

    @property
    def lately(self) -> float:
        return float(np.mean(self.past[-3:] or [0.0]))

    def noted(self) -> float:
        return sum(sum(noted for noted in self.by_name[name]) + sum(self.of_batch.values()) for name in ["loss"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [
            {"scheduler": LambdaLR(optimizer, lambda _: 1 / (1 + len(self.steps))), "interval": "step"}
        ]


def test_lists_that_code_looks_into_while_it_trains_go_on(tmp_path):
    check(Case(shuffled, LooksBack, at=[2, 7]), tmp_path)


class TellsOfThem(Net):
    """Looks into its lists before and after training, and for somebody who asks."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.of_step: dict[int, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.steps.append(self.global_step)
        self.of_step[self.global_step] = 0.5
        return self.note(self.loss(batch))

    def on_train_start(self) -> None:
        print(len(self.steps))

    def on_train_end(self) -> None:
        self.summary = self.average()

    def average(self) -> float:
        return sum(self.steps) / len(self.of_step)


def test_lists_that_it_looks_into_before_and_after_are_records(tmp_path):
    case = Case(shuffled, TellsOfThem, steps=6)
    train(case, tmp_path, 1)
    _, _, trainer = train(case, tmp_path / "again", 2, tmp_path / "step=4")
    assert trainer.lightning_module.steps == [*trainer.lightning_module.of_step] == [4, 5]


def test_a_list_that_decides_and_is_too_large_is_named(tmp_path, caplog):
    class Long(LooksBack):
        def on_train_batch_end(self, *args: Any) -> None:
            self.past.extend([0.5] * 2_200_000 if self.global_step == 1 else [])

    train(Case(shuffled, Long, steps=2), tmp_path, 1)
    assert [record.levelname for record in caplog.records if "module.past has changed" in record.message] == ["WARNING"]


class Transition(NamedTuple):
    state: torch.Tensor
    reward: float = 0.0


class Replays(Net):
    """From a memory of what it has seen, with names, and from a mean with a count."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: deque[Transition] = deque(maxlen=5)
        self.best = Transition(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.memory.append(Transition(batch.detach(), float(batch.mean())))
        self.best = max(self.best, *self.memory, key=lambda one: one.reward)
        drawn = random.choice(self.memory)
        return self.note(self.loss(batch) * (drawn.state.mean() + drawn.reward + self.best.reward))


def test_tuples_with_names_go_on(tmp_path):
    check(Case(shuffled, Replays, at=[2, 7]), tmp_path)


@dataclass
class Counted:
    times: int = 0


class Draws(Net):
    """From objects of its own, as they came; others it only notes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: deque[Counted] = deque(maxlen=5)
        self.counted: list[Counted] = []
        self.by_batch: dict[int, Counted] = {}
        self.cached: dict[int, Counted] = {}
        self.of_step: dict[str, Counted] = {}
        self.noted: list[Counted] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.memory.append(Counted(batch_idx))
        self.counted.append(Counted(batch_idx))
        self.by_batch[batch_idx] = Counted(batch_idx)
        if batch_idx not in self.cached:
            self.cached[batch_idx] = Counted(batch_idx)
        self.noted.append(Counted())
        drawn = self.memory[0].times + sum(one.times for one in [*self.counted, *self.by_batch.values()])
        self.of_step["one"] = Counted(batch_idx)
        drawn += self.cached[batch_idx].times + self.of_step["one"].times
        return self.note(self.loss(batch) * drawn)


def test_objects_in_lists_that_decide_are_named(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(Case(shuffled, Draws, steps=2), tmp_path, 1)
    told = {(record.message.split()[3], record.levelname) for record in caplog.records if "attribute" in record.message}
    levels = {
        "WARNING": ["memory", "counted", "by_batch"],
        "INFO": [
            "by_batch",
            "cached",
            "of_step",
            "noted",
            "losses",
        ],  # the second step shows what grows
    }
    assert told == {(f"module.{name}", level) for level, names in levels.items() for name in names}


def test_a_list_that_is_a_dictionary_today_stays_as_the_program_makes_it(tmp_path):
    class Listed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.weights: Any = [1.0, 2.0]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.weights[0] *= 0.9
            return self.note(self.loss(batch) * self.weights[0])

    class Named(Listed):
        def __init__(self) -> None:
            super().__init__()
            self.weights = {0: 3.0}

    train(Case(shuffled, Listed, steps=3), tmp_path, 1)
    _, _, trainer = train(Case(shuffled, Named, steps=4), tmp_path / "again", 1, tmp_path / "step=3")
    assert trainer.lightning_module.weights == {0: 3.0 * 0.9}


def test_a_record_of_losses_is_of_this_life(tmp_path):
    case = Case(shuffled, steps=6)
    train(case, tmp_path, 1)
    losses, _, trainer = train(case, tmp_path / "again", 2, tmp_path / "step=4")
    assert losses == trainer.lightning_module.losses
    assert len(losses) == 2


@pytest.mark.parametrize(
    ("before", "change", "is_record"),
    [
        ([], lambda v: v.append(1.0), True),
        ([1.0], lambda v: v.extend([2.0, "three"]), True),
        ([{"loss": 1.0}], lambda v: v.append({"loss": 2.0}), True),
        ({}, lambda v: v.update({1: 0.5}), True),
        ({1: [0.5]}, lambda v: v.update({2: [0.25]}), True),
        ({1}, lambda v: v.add(2), True),
        ([1.0, 2.0], lambda v: v.__setitem__(0, 3.0), False),
        ([1.0, 2.0], lambda v: v.clear(), False),
        ([{"loss": 1.0}], lambda v: v[0].update({"loss": 2.0}), False),
        ({1: 0.5}, lambda v: v.update({1: 0.25, 2: 1.0}), False),
        ({1, 2}, lambda v: v.remove(1), False),
        (deque([1.0]), lambda v: v.append(2.0), True),
        (deque([1.0]), lambda v: v.appendleft(2.0), False),
        (deque([1.0], 3), lambda v: v.append(2.0), False),
        ([], lambda v: v.append(torch.tensor(2.0)), True),
        ([], lambda v: v.append((3, torch.tensor(2.0))), True),
        ([], lambda v: v.append(torch.ones(2)), False),
        ({}, lambda v: v.update({"a": (1, torch.ones(2))}), False),
        ([], lambda v: v.extend([torch.ones(1)] * 5000), True),
    ],
)
def test_a_record_is_only_added_to(before, change, is_record):
    records = Records()
    records.begin([("there", before)], Uses({}))
    change(before)
    assert records.has("there", before) == is_record
    assert records.has("there", before) == is_record


def test_what_is_brought_back_is_none():
    records = Records()
    records.go_on_with(["there"])
    records.begin([], Uses({}))
    assert not records.has("there", [1.0])
