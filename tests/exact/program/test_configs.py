"""Entries of OmegaConf's configurations that training changes."""

from __future__ import annotations

import pytest
from exact.runs import Case, Net, check, shuffled, train
from omegaconf import OmegaConf

from nemologger.exact.program.configs import Config


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


@pytest.mark.parametrize("config", [OmegaConf.create("???"), OmegaConf.create({"a": "${b}", "b": [1]}).a])
def test_one_that_says_nothing_or_is_read_only_is_no_obstacle(config):
    OmegaConf.set_readonly(config, True)
    vars(Config(config))
    Config(config).length = "no number"
    Config(config).new = 3
