"""Entries of OmegaConf's configurations that training changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from exact.runs import Case, Net, check, shuffled, train
from omegaconf import II, MISSING, OmegaConf

from nemologger.exact.program.attributes import Attributes
from nemologger.exact.reach.configs import Config


def made():
    config = OmegaConf.create({
        "weight": 1.0, "patience": 3, "same": "${weight}", "all": "${inner}",
        "inner": {"few": [1.0, 2.0], "queue": [0.1, 0.2, 0.3, 0.4]},
    })  # fmt: skip
    OmegaConf.set_struct(config, True)
    return config


class Configured(Net):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)
        self.config = {"of it": config}

    def training_step(self, batch, batch_idx):
        config = self.config["of it"]
        config.weight *= 0.9
        config.inner.few[0] += 0.1
        config.inner.few.append(0.1)
        config.inner.queue.pop(0) if len(config.inner.queue) > 1 else None
        return self.note(self.loss(batch) * (config.same + sum(config.inner.few) + sum(config.all.queue)))


class AmongOthers(Net):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        self.hparams.config.weight *= 0.9
        return self.note(self.loss(batch) * self.hparams["config"].same)


@pytest.mark.parametrize("model", [Configured, AmongOthers])
def test_entries_of_a_configuration_go_on(model, tmp_path):
    check(Case(shuffled, lambda: model(made()), at=[2, 7]), tmp_path)


def test_entries_that_training_did_not_change_are_as_the_program_has_them_today(tmp_path):
    train(Case(shuffled, lambda: Configured(made()), steps=3), tmp_path, 1)
    today = made()
    today.patience, today.weight = 7, 2.0
    train(Case(shuffled, lambda: Configured(today), steps=4), tmp_path / "again", 1, tmp_path / "step=3")
    assert (today.patience, today.weight) == (7, pytest.approx(0.9**4))


@dataclass
class Typed:
    either: int | str = 3
    path: Path = Path("here")
    few: list[int | str] = field(default_factory=lambda: [1, "a"])
    nothing: dict[str, int] | None = None
    same: int = II("either")
    missing: int = MISSING
    inner: dict[str, float] = field(default_factory=lambda: {"a": 1.0})


def test_entries_are_what_omegaconf_says_without_asking_for_each():
    config = OmegaConf.structured(Typed)
    entries = vars(Config(config))
    assert (entries.pop("few"), entries.pop("inner")) == (config.few, config.inner)
    assert entries == {
        "either": 3, "path": Path("here"), "nothing": None, "same": "${either}", "missing": "???",
    }  # fmt: skip
    assert type(entries["either"]) is int
    assert vars(Config(config.few)) == {"length": 2, "0": 1, "1": "a"}


def test_generators_are_not_looked_for_in_one(monkeypatch):
    """Each part of it knows the whole: that would take a second for some hundred entries."""
    looked_at = []
    monkeypatch.setattr("nemologger.exact.program.attributes.Look", lambda roots: looked_at.append(roots))
    roots = {"module": Configured(made())}
    list(Attributes(roots, {}, {"module"}, frozenset(), 0)._generators())
    assert not [name for one in looked_at for root in one.values() for name in vars(root) if name == "inner"]


@pytest.mark.parametrize("config", [OmegaConf.create("???"), OmegaConf.create({"a": "${b}", "b": [1]}).a])
def test_one_that_says_nothing_or_is_read_only_is_no_obstacle(config):
    OmegaConf.set_readonly(config, True)
    vars(Config(config))
    Config(config).length = "no number"
    Config(config).new = 3
