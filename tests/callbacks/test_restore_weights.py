"""First weights, as a callback by itself."""

from __future__ import annotations

import pytest
import torch
from toy import ToyModel, loader, quiet_trainer

from nemologger import CheckpointError, ModelCheckpoint, ModelMismatchError
from nemologger.callbacks.restore_weights import RestoreWeights
from nemologger.checkpoint.reading.load import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    saves = ModelCheckpoint(dirpath=directory, filename="x", every_n_train_steps=5, save_weights_only=True)
    trainer = quiet_trainer(max_steps=5, callbacks=[saves])
    trainer.fit(ToyModel(), loader(), loader())
    trainer.save_checkpoint(directory / "x.ckpt")
    return directory


@pytest.mark.parametrize("name", ["x", "x/weights", "x.ckpt"])
def test_it_loads_before_validation_and_training(run, name):
    expected = load_model(run / "x")
    model = ToyModel()
    trainer = quiet_trainer(callbacks=[RestoreWeights(run / name)])
    trainer.validate(model, loader(), verbose=False)
    assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())
    fresh = quiet_trainer(max_steps=1, val_check_interval=1, callbacks=[RestoreWeights(run / name)])
    other = ToyModel()
    fresh.fit(other, loader(), loader())
    assert other.losses[0] != _first_loss_without()


def _first_loss_without() -> float:
    model = ToyModel()
    quiet_trainer(max_steps=1, val_check_interval=1).fit(model, loader(), loader())
    return model.losses[0]


def test_a_missing_optimizer_is_an_error_when_it_was_asked_for(run):
    trainer = quiet_trainer(max_steps=5, callbacks=[RestoreWeights(run / "x", optimizer=True)])
    with pytest.raises(CheckpointError, match="load_optim_state=False"):
        trainer.fit(ToyModel(), loader(), loader())


def test_a_file_of_weights_alone_is_named(tmp_path):
    torch.save(ToyModel().state_dict(), tmp_path / "weights.pt")
    trainer = quiet_trainer(max_steps=5, callbacks=[RestoreWeights(tmp_path / "weights.pt")])
    with pytest.raises(CheckpointError, match=r"weights\.pt has no 'state_dict'(.|\n)*load_state_dict"):
        trainer.fit(ToyModel(), loader(), loader())


def test_another_model_is_refused(run):
    trainer = quiet_trainer(max_steps=5, callbacks=[RestoreWeights(run / "x")])
    with pytest.raises(ModelMismatchError):
        trainer.fit(ToyModel(width=3), loader(), loader())
