"""Weights without a Trainer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from toy import ToyModel, loader, quiet_trainer

from nemologger import (
    ConfigurationError,
    ModelCheckpoint,
    ModelMismatchError,
    NotFoundError,
    export_weights,
    load_model,
    load_weights,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint without context, and the state of the model at that moment."""
    directory = tmp_path_factory.mktemp("run")
    saves = ModelCheckpoint(dirpath=directory, filename="x", every_n_train_steps=5, always_save_context=False)
    model = ToyModel()
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(model, loader(), loader())
    return directory / "x", {key: value.clone() for key, value in model.state_dict().items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("where", ["", "weights"])
def test_into_a_module(trained, where):
    checkpoint, state = trained
    assert not (checkpoint / "context").exists()
    model = ToyModel()
    load_weights(checkpoint / where, model)
    assert _same(model.state_dict(), state)


def test_another_module_is_refused_by_name_unless_it_need_not_be_the_same(trained):
    checkpoint, state = trained
    other = torch.nn.ModuleDict({"net": ToyModel().net, "head": torch.nn.Linear(2, 2)})
    with pytest.raises(ModelMismatchError, match=r"head\.weight"):
        load_weights(checkpoint, other)
    load_weights(checkpoint, other, strict=False)
    assert torch.equal(other["net"][0].weight, state["net.0.weight"])
    with pytest.raises(ModelMismatchError, match=r"\(8, 8\) in the checkpoint, \(16, 8\) in the model"):
        load_weights(checkpoint, ToyModel(width=16), strict=False)


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt"])
def test_into_a_file_of_torch(trained, tmp_path, name):
    checkpoint, state = trained
    written = export_weights(checkpoint, tmp_path / "new" / name)
    assert _same(torch.load(written, weights_only=True), state)


def test_into_safetensors(trained, tmp_path):
    checkpoint, state = trained
    assert _same(load_file(export_weights(checkpoint, tmp_path / "model.safetensors")), state)


def test_mistakes(trained, tmp_path):
    with pytest.raises(ConfigurationError, match=r"\.safetensors or \.pt"):
        export_weights(trained[0], tmp_path / "model.onnx")
    with pytest.raises(NotFoundError):
        export_weights(tmp_path / "gone", tmp_path / "model.pt")


def test_the_model_itself_with_its_weights(tmp_path):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    trained = ToyModel(width=4)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(trained, loader(), loader())
    model = load_model(tmp_path / "x")
    assert isinstance(model, ToyModel)
    assert not model.training
    assert _same(model.state_dict(), trained.state_dict())
