"""What functions that make learning rates, and optimizers of the program, keep from step to step."""

from __future__ import annotations

import importlib
import random
from functools import partial

import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, MultiplicativeLR

from nemologger.exact.program.functions import holders_of_schedule

CALLS = 0


class Counts:
    def __init__(self):
        self.calls = 0

    def next(self, step):
        self.calls += 1
        return 0.99**self.calls


class Slower(torch.optim.SGD):
    """Counts its steps in an attribute."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            group["momentum"] = 0.9 / self.steps
        return super().step(closure)


class Scheduled(Net):
    """A variable that is set, a list, a global one, an object's method, and a generator; and one that is given."""

    base = 0.99

    def configure_optimizers(self):
        counted, noted, base, counts = 0, [0], self.base, Counts()
        generator = torch.Generator().manual_seed(3)

        def in_variable(by, step):
            nonlocal counted
            counted += by
            return base**counted

        def in_list(step):
            noted[0] += 1
            return 1 - noted[0] / 100

        def in_global(step):
            global CALLS
            CALLS += 1
            return 1 - CALLS % 50 / 100

        def drawn(step):
            return 0.9 + 0.1 * torch.rand(1, generator=generator).item()

        optimizer = Slower(self.parameters(), lr=1e-2)
        schedules = [LambdaLR(optimizer, partial(in_variable, 1)), MultiplicativeLR(optimizer, in_list)]
        schedules += [MultiplicativeLR(optimizer, f) for f in (in_global, counts.next, drawn)]
        return [optimizer], [{"scheduler": ChainedScheduler(schedules), "interval": "step"}]


def test_schedules_that_know_each_other():
    inner = LambdaLR(torch.optim.SGD(Net().parameters(), lr=1), Counts().next)
    inner.within = outer = ChainedScheduler([inner])
    assert list(holders_of_schedule("schedule", outer)) == ["schedule._schedulers.0.lr_lambdas.0"]


def test_they_go_on_as_they_were(tmp_path):
    check(Case(shuffled, Scheduled, at=[2, 7]), tmp_path)


class ByHand(Net):
    """Schedules that the module steps itself: one is an attribute, one in a list."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        calls = [0]

        def counted(step):
            calls[0] += 1
            return 0.99 ** calls[0]

        self.schedule = LambdaLR(optimizer, counted)
        self.more = [MultiplicativeLR(optimizer, Counts().next)]
        return optimizer

    def on_train_batch_end(self, *given):
        self.schedule.step()
        self.more[0].step()


def test_functions_of_schedules_that_the_module_steps_itself_go_on(tmp_path):
    check(Case(shuffled, ByHand, at=[2, 7]), tmp_path)


class Drawing(Net):
    """A generator that a function of a schedule was made with."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)

        def drawn(rng, step, *, more=random.Random(1)):  # noqa: B008
            return 0.5 + rng.random() * more.random()

        schedule = LambdaLR(optimizer, partial(drawn, random.Random(2)))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_generators_that_a_function_of_a_schedule_was_made_with_go_on(tmp_path):
    check(Case(shuffled, lambda: Drawing(), at=[2, 7]), tmp_path)


def test_what_the_program_gives_today_stays(tmp_path):
    train(Case(shuffled, Scheduled, steps=3), tmp_path, 1)

    def other():
        model = Scheduled()
        model.base = 0.5
        return model

    _, _, trainer = train(Case(shuffled, other, steps=4), tmp_path / "again", 1, tmp_path / "step=2")
    first = trainer.lr_scheduler_configs[0].scheduler._schedulers[0].lr_lambdas[0]
    variables = dict(zip(first.func.__code__.co_freevars, first.func.__closure__, strict=True))
    assert (variables["base"].cell_contents, variables["counted"].cell_contents) == (0.5, 5)


class Noisy(torch.optim.lr_scheduler.LRScheduler):
    """Has a generator and an object that counts, which torch takes for its state."""

    def __init__(self, optimizer):
        self.generator, self.counts = torch.Generator().manual_seed(3), Counts()
        super().__init__(optimizer)

    def get_lr(self):
        noise = torch.rand(1, generator=self.generator).item() + self.counts.next(self.last_epoch)
        return [rate * noise for rate in self.base_lrs]


class NoisilyScheduled(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": Noisy(optimizer), "interval": "step"}]


def test_what_the_state_of_a_schedule_cannot_hold_is_not_lost_with_it(tmp_path, caplog):
    check(Case(shuffled, NoisilyScheduled, at=(3, 8)), tmp_path)
    assert "None takes its place" not in caplog.text


LIBRARY = """
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

class Counts(LRScheduler):
    def __init__(self, optimizer):
        self.calls, self.factors, self.parameters = 0, [], optimizer.param_groups[0]["params"]
        super().__init__(optimizer)
    def get_lr(self):
        self.calls += 1
        self.factors.append(0.9**self.calls)
        return [rate * self.factors[-1] * self.factors[-2:][0] for rate in self.base_lrs]
    def state_dict(self):
        return {"last_epoch": self.last_epoch}
    def load_state_dict(self, state_dict):
        self.last_epoch = state_dict["last_epoch"]

class Alone:
    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, 0
    def step(self):
        self.calls += 1
        self.optimizer.param_groups[0]["lr"] = 0.9**self.calls / 100
    def state_dict(self):
        return {}
    def load_state_dict(self, state_dict):
        pass

class Waits:
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.within = ReduceLROnPlateau(optimizer, factor=0.5, patience=1, cooldown=2)
    def step(self):
        self.within.step(1.0)
    def state_dict(self):
        return {"best": self.within.best}
    def load_state_dict(self, state_dict):
        self.within.best = state_dict["best"]
"""


@pytest.mark.parametrize(("name", "within"), [("Counts", False), ("Counts", True), ("Alone", False), ("Waits", False)])
def test_what_a_librarys_schedule_leaves_out_of_its_state_goes_on(name, within, tmp_path, monkeypatch, caplog):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "some_schedules.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    kind = getattr(importlib.import_module("some_schedules"), name)

    class Has(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            schedule = ChainedScheduler([kind(optimizer)]) if within else kind(optimizer)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step()

    check(Case(shuffled, Has, at=[3, 8]), tmp_path)
    assert "schedule 0" not in caplog.text
