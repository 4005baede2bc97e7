"""A new run that begins with the weights of another: RestoreConfig on real checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.toy_lives import live, ten_steps
from toy import ToyModel, loader

from nemologger import AutoResume, ConfigurationError, RestoreConfig
from nemologger.checkpoint.reading.load import load_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return ten_steps(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    "where", ["toy", "toy/checkpoints", "toy/checkpoints/step=10", "toy/checkpoints/step=10/weights"]
)
@pytest.mark.parametrize("optimizer", [False, True])
def test_first_weights_of_a_new_run(finished, tmp_path, where, optimizer):
    path = str(finished.parent.parent / where)
    config = RestoreConfig(path=path, load_optim_state=optimizer)
    seen = {}

    class Spy(ToyModel):
        def on_train_start(self):
            seen["weight"] = self.net[0].weight.detach().clone()
            state = self.optimizers().state
            seen["steps"] = {int(s["step"]) for s in state.values()} or {0}

    found, model, _ = live(tmp_path, 5, Spy(), AutoResume(restore_config=config, resume_if_exists=True))
    assert found.weights_from is not None
    assert torch.equal(seen["weight"], load_model(finished / "step=10")["net.0.weight"])
    assert seen["steps"] == ({10} if optimizer else {0})
    assert min(model.losses) == 0
    found, model, _ = live(tmp_path, 10, Spy(), AutoResume(restore_config=config, resume_if_exists=True))
    assert found.weights_from is None  # its own checkpoint comes first
    assert min(model.losses) == 5


def test_first_weights_are_loaded_once(finished, tmp_path):
    """Not again over what has been trained since, by a validation or another fit of the same trainer."""
    resume = AutoResume(restore_config=RestoreConfig(path=str(finished / "step=10")), resume_if_exists=True)
    _, model, trainer = live(tmp_path, 5, resume=resume)
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.validate(model, loader(), verbose=False)
    assert all(torch.equal(trained[key], value) for key, value in model.state_dict().items())
    trainer.fit_loop.epoch_loop.max_steps = 7
    trainer.fit(model, loader(), loader())
    assert trainer.global_step == 7
    base = load_model(finished / "step=10")
    assert not torch.equal(model.net[0].weight, base["net.0.weight"])


@pytest.mark.parametrize("make", [lambda: AutoResume(restore_config="runs/base"), lambda: RestoreConfig(path=None)])
def test_mistakes_in_restore_config_are_named(make):
    with pytest.raises(ConfigurationError, match="RestoreConfig"):
        make()
