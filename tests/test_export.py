"""Weights without a Trainer."""

from __future__ import annotations

import re
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import export_memory
from processes import python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy import ToyModel, loader, quiet_trainer

from nemologger import (
    ConfigurationError,
    DamagedCheckpointError,
    ModelCheckpoint,
    ModelMismatchError,
    NotFoundError,
    export_weights,
    load_model,
    load_weights,
)
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.state.stage import payload
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import LocalDisk
from nemologger.ranks import SingleProcess


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


def _into(checkpoint, output, **options):
    load_weights(checkpoint, ToyModel(), **options)


@pytest.mark.parametrize("read", [_into, export_weights])
@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied", "removed"])
def test_damage_is_found_not_loaded(trained, tmp_path, read, harm):
    """In each file in turn."""
    checkpoint, _ = trained
    output = tmp_path / "model.pt"
    read(checkpoint, output)
    output.unlink(missing_ok=True)
    for path in [checkpoint / "manifest.json", *sorted((checkpoint / "weights").iterdir())]:
        hurt = shutil.copytree(checkpoint, tmp_path / path.name) / path.relative_to(checkpoint)
        content = bytearray(hurt.read_bytes())
        hurt.unlink()
        if harm == "flipped":
            for at in range(100, len(content), 64):  # no payload is smaller
                content[at] ^= 16
        if harm != "removed":
            hurt.write_bytes({"flipped": content, "cut": content[:-1], "emptied": b""}[harm])
        elif path.name == "manifest.json":
            continue  # whoever takes out the weights leaves it behind
        with pytest.raises((DamagedCheckpointError, NotFoundError), match=re.escape(path.name)):
            read(tmp_path / path.name, output)
        assert not output.exists()


@contextmanager
def files_up_to(size):
    """While it lasts, no file gets larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def written(tmp_path):
    """A function that makes a checkpoint of a state dictionary."""

    def write(state):
        Saver(LocalDisk(), SingleProcess()).save(take({"state_dict": state}), tmp_path / "x", Manifest(step=1, epoch=0))
        return tmp_path / "x"

    return write


KINDS = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint64, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def test_safetensors_of_every_kind(written, tmp_path):
    """As the library writes them, but for the order."""
    of_bytes = torch.arange(48, dtype=torch.uint8) % 2
    state = {f"{kind} \N{GREEK SMALL LETTER BETA}": of_bytes.clone().view(kind).reshape(2, -1) for kind in KINDS}
    state |= {"number": torch.tensor(2.5), "empty": torch.zeros(0, 3), "odd": torch.ones(3, dtype=torch.int8)}
    exported = export_weights(written(state), tmp_path / "model.safetensors")
    save_file(state, tmp_path / "theirs.safetensors")
    found, wanted = load_file(exported), load_file(tmp_path / "theirs.safetensors")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert bytes(payload(found[key])) == bytes(payload(tensor)), key
    with safe_open(exported, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_safetensors_does_not_know_is_an_error(written, tmp_path):
    for value, what in (
        (torch.ones(2, dtype=torch.complex128), "no torch.complex128"),
        (torch.eye(2).to_sparse(), "w is sparse"),
    ):
        with pytest.raises(ConfigurationError, match=what):
            export_weights(written({"w": value}), tmp_path / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are Linux's")
def test_the_model_is_in_memory_once(written, tmp_path):
    """And a few buffers of fixed size. A second copy of it would be twice."""
    checkpoint = written({f"w{i}": torch.rand(1024, 1024) for i in range(16)})
    outputs = [tmp_path / "model.pt", tmp_path / "model.safetensors"]
    done = python(Path(export_memory.__file__), checkpoint, *outputs)
    assert max(map(float, done.stdout.split())) < 1.7 * 16 * 4 * 1024**2
    assert {path.stat().st_mode for path in outputs} == {(checkpoint / "manifest.json").stat().st_mode}


def test_a_full_disk_leaves_what_was_there(written, tmp_path):
    for name in ("model.pt", "model.safetensors"):
        checkpoint = written({"w": torch.ones(1000)})
        (tmp_path / name).write_text("before")
        with pytest.raises(OSError, match="too large"), files_up_to(1000):
            export_weights(checkpoint, tmp_path / name)
        assert (tmp_path / name).read_text() == "before"
    assert len([*tmp_path.iterdir()]) == 3


def test_mistakes(trained, tmp_path):
    (tmp_path / "runs.pt").mkdir()
    with pytest.raises(ConfigurationError, match=r"\.safetensors or \.pt"):
        export_weights(trained[0], tmp_path / "model.onnx")
    with pytest.raises(ConfigurationError, match=r"module is a str, expected a torch\.nn\.Module"):
        load_weights(ToyModel(), "model")
    with pytest.raises(NotFoundError):
        export_weights(tmp_path / "gone", tmp_path / "model.pt")
    with pytest.raises(ConfigurationError, match="is a directory: give the name of a file"):
        export_weights(trained[0], tmp_path / "runs.pt")
    exported = export_weights(trained[0], tmp_path / "model.safetensors")
    with pytest.raises(NotFoundError, match=r"model\.safetensors is a file, .* safetensors\.torch\.load_model"):
        load_weights(exported, ToyModel())


class Late(ToyModel):
    """Makes a layer in one hook, and another one, where the checkpoint has it, in a second."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.late = self.grown = None

    def configure_model(self):
        if self.late is None:
            self.late = torch.nn.Linear(3, 3)

    def on_load_checkpoint(self, checkpoint):
        if "grown.weight" in checkpoint["state_dict"]:
            self.grown = torch.nn.Linear(2, 2)


class Sharding(ToyModel):
    """Would fail without ranks."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()

    def configure_model(self):
        if self._trainer is None:
            raise AssertionError("there is no mesh of ranks")


def grown():
    model = Late()
    model.grown = torch.nn.Linear(2, 2)
    return model


@pytest.mark.parametrize("make", [Late, grown, Sharding])
def test_a_model_with_layers_of_its_hooks(tmp_path, make):
    """``Model.load_from_checkpoint`` makes them too."""
    trained = make()
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(trained, loader(), loader())
    assert _same(load_model(tmp_path / "x").state_dict(), trained.state_dict())


def test_the_model_itself_with_its_weights(tmp_path):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    trained = ToyModel(width=4)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(trained, loader(), loader())
    model = load_model(tmp_path / "x")
    assert isinstance(model, ToyModel)
    assert not model.training
    assert _same(model.state_dict(), trained.state_dict())
