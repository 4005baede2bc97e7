"""Networks that no checkpoint sees where they are: teachers in a list, averages of weights in an object or a callback."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nemologger.exact.program.apart import Apart


class Average:
    """A copy that follows, as many programs have it."""

    __slots__ = ("network",)

    def __init__(self, network):
        self.network = copy.deepcopy(network).eval()

    @torch.no_grad()
    def follow(self, network):
        for mean, weight in zip(self.network.parameters(), network.parameters(), strict=True):
            mean.data.lerp_(weight.data, 0.1)


class Taught(Net):
    """Its losses show its teachers."""

    def __init__(self):
        super().__init__()
        self.average = Average(self.net)
        self.teachers = [Average(self.net).network, nn.Linear(4, 4).requires_grad_(False)]

    def training_step(self, batch, batch_idx):
        shown = sum(teacher(torch.ones(1, 4)).sum() for teacher in [self.average.network, *self.teachers])
        return self.note(self.loss(batch) + shown.detach())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.follow(self.net)
        with torch.no_grad():
            self.teachers[0].load_state_dict({name: 0.5 * one for name, one in self.net.state_dict().items()})


class Follows(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.module, self.average = pl_module, Average(pl_module.net)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.mul_(1 + self.average.network(torch.ones(1, 4)).detach().mean())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.average.follow(pl_module.net)


def taught():
    """With the same frozen teacher in each life."""
    model = Taught()
    nn.init.ones_(model.teachers[1].weight)
    nn.init.zeros_(model.teachers[1].bias)
    return model


@pytest.mark.parametrize(
    "case", [Case(shuffled, taught, at=[7]), Case(shuffled, callbacks=lambda: [Follows()], at=[7])]
)
def test_networks_that_follow_go_on_as_they_were(case, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check(case, tmp_path)
    assert "exact resume, attribute" not in caplog.text


def test_a_frozen_one_is_not_saved_and_named_where_the_program_makes_another(tmp_path, caplog):
    train(Case(shuffled, Taught, steps=2), tmp_path, 1)
    assert "exact resume, attribute" not in caplog.text
    train(Case(shuffled, Taught, steps=3), tmp_path / "other", 2, tmp_path / "step=2")
    told = [record.getMessage() for record in caplog.records if "exact resume, attribute" in record.getMessage()]
    assert len(told) == 1
    assert "module.teachers.1 had not changed since training began, so it was not saved" in told[0]


def test_one_that_is_too_large_is_named_with_what_to_do(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nemologger.callbacks.program_state.most_of_each", lambda ranks: 100)
    train(Case(shuffled, taught, steps=4), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "module.average.network" in record.getMessage()]
    assert len(told) == 1
    assert "and is not saved: it is too large" in told[0]
    assert "self.teacher = teacher" in told[0]
    assert "teachers.1" not in caplog.text  # that one has not changed


def never_made():
    return nn.Linear.__new__(nn.Linear)


def with_buffer(buffer):
    network = nn.Linear(2, 2)
    network.register_buffer("odd", buffer)
    return network


def test_odd_ones_are_no_obstacle_and_those_beside_them_go_on(tmp_path):
    class Beside(Taught):
        def __init__(self):
            super().__init__()
            nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
            by_columns = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
            odd = [
                with_buffer(torch.eye(2).to_sparse()),
                with_buffer(nested),
                nn.LazyLinear(2),
                never_made(),
                by_columns,
            ]
            self.odd = [*odd, nn.Linear(2, 2, device="meta")]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            self.odd[2](torch.ones(1, 3))
            with torch.no_grad():
                for network in self.odd[:2]:
                    network.weight.mul_(0.5)

    def beside():
        model = Beside()
        nn.init.ones_(model.teachers[1].weight)
        nn.init.zeros_(model.teachers[1].bias)
        return model

    check(Case(shuffled, beside, at=[7]), tmp_path)


class Scores(pl.Callback):
    """With networks that are made when they are first needed, or anew each time, and copies of the model's."""

    def __init__(self):
        self.scorer = self.copy = self.average = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scorer = self.scorer or nn.Linear(50, 50)
        self.anew = nn.Linear(50, 50)
        self.copy = self.copy or copy.deepcopy(pl_module.net)
        self.average = self.average or nn.Linear(60, 60)
        self.average.weight.data.mul_(0.9)


@pytest.mark.parametrize("most", [100, 2**20])
def test_of_those_made_later_copies_and_what_changes_are_named_and_no_other(most, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nemologger.callbacks.program_state.most_of_each", lambda ranks: most)
    train(Case(shuffled, callbacks=lambda: [Scores()], steps=4), tmp_path, 1)
    train(Case(shuffled, callbacks=lambda: [Scores()], steps=5), tmp_path / "again", 1, tmp_path / "step=4")
    told = [record.getMessage().split()[5] for record in caplog.records if "exact resume, attr" in record.getMessage()]
    assert {name.rpartition(".")[2] for name in told} == {"copy", "average"}
    if most > 100:
        assert "when training starts, and what is made later is not brought back: make it in setup() or" in caplog.text


def test_sharded_ones_that_change_are_named(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        still, changes = (nn.Linear(4, 4) for _ in range(2))
        for network in (still, changes):
            fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
        apart = Apart(lambda: {"module": SimpleNamespace(teachers=[still, changes])}, nn.Linear(2, 2), (), 2**20)
        with torch.no_grad():
            changes.weight.mul_(0.9)
        kept, lost = apart.to_plain()
    finally:
        torch.distributed.destroy_process_group()
    assert (list(kept), lost) == (["module.teachers.0"], {"module.teachers.1": "is a special DTensor"})


def test_one_that_is_another_today_stays_as_the_program_makes_it(tmp_path, caplog):
    train(Case(shuffled, taught, steps=2), tmp_path, 1)
    model = taught()
    model.average.network[0] = nn.Linear(4, 8, bias=False)
    there = {name: value.clone() for name, value in model.average.network.state_dict().items()}
    model.on_train_batch_end = lambda outputs, batch, batch_idx: None
    train(Case(shuffled, lambda: model, steps=3), tmp_path / "other", 1, tmp_path / "step=2")
    assert caplog.text.count("module.average.network was saved, and begins as the program makes it") == 1
    assert all(torch.equal(value, there[name]) for name, value in model.average.network.state_dict().items())


GLOBAL = nn.Linear(4, 4)
DRAWS = torch.Generator()


class HoldsMany(Net):
    """Forty in a list, some in lists of a dictionary, and a global one with a generator; all of them shrink."""

    def __init__(self):
        super().__init__()
        self.many = [nn.Linear(1, 1) for _ in range(40)]
        self.groups = {"a": [nn.Linear(1, 1)], "b": [nn.Linear(1, 1), nn.Linear(1, 1)]}

    def training_step(self, batch, batch_idx):
        networks = [*self.many, *self.groups["a"], *self.groups["b"], GLOBAL]
        shown = sum(network.weight.detach().sum() for network in networks)
        with torch.no_grad():
            for network in networks:
                network.weight.mul_(0.9)
        return self.note(self.loss(batch) + shown + torch.rand(1, generator=DRAWS))


class LeavesOut(pl.Callback):
    """Its state has nothing of the network."""

    def on_fit_start(self, trainer, pl_module):
        self.network = copy.deepcopy(pl_module.net)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.mul_(1 + self.network[0](torch.ones(1, 4)).detach().mean())
        with torch.no_grad():
            self.network[0].weight.lerp_(pl_module.net[0].weight, 0.1)

    def state_dict(self):
        return {"seen": 1}


def holds_many():
    model = HoldsMany()
    DRAWS.manual_seed(1)
    for network in [*model.many, *model.groups["a"], *model.groups["b"], GLOBAL]:
        nn.init.ones_(network.weight)
    return model


@pytest.mark.parametrize(
    "case", [Case(shuffled, holds_many, at=[7]), Case(shuffled, callbacks=lambda: [LeavesOut()], at=[7])]
)
def test_so_do_those_farther_away(case, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check(case, tmp_path)
    assert "exact resume, attribute" not in caplog.text


def test_a_callback_that_may_save_it_itself_is_not_spoken_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nemologger.callbacks.program_state.most_of_each", lambda ranks: 10)
    train(Case(shuffled, callbacks=lambda: [LeavesOut()], steps=4), tmp_path, 1)
    assert "network" not in caplog.text
