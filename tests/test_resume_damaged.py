"""Damaged and unfinished checkpoints: found before a run goes on from them, and while they are loaded."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.toy_lives import found_in, ten_steps
from helpers.weights import places_of
from toy import ToyModel, loader, names, quiet_trainer

from nemologger import (
    AutoResume,
    DamagedCheckpointError,
    NemologgerError,
    NotFoundError,
    UnfinishedCheckpointError,
)
from nemologger.checkpoint.reading.load import load_model
from nemologger.checkpoint.reading.read import read_tensors
from nemologger.checkpoint.weights import described


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return ten_steps(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def checkpoints(finished, tmp_path) -> Path:
    """A copy of them to damage."""
    return shutil.copytree(finished, tmp_path / "toy" / "checkpoints", symlinks=True)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
@pytest.mark.parametrize(
    "file", ["weights/__0_0.distcp", "weights/common.pt", "weights/.metadata", "weights/metadata.json", "manifest.json",
             "context/io.json"]
)  # fmt: skip
def test_a_damaged_newest_falls_back_loudly(checkpoints, caplog, file, damage):
    shutil.rmtree(checkpoints / "step=10-last")  # its bytes are those of step=10
    path = checkpoints / "step=10" / file
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage != "remove":
        path.write_bytes({"flip": content, "truncate": content[: len(content) // 2], "empty": b""}[damage])
    with caplog.at_level(logging.ERROR):
        assert found_in(checkpoints) == checkpoints / "step=5"
    assert "step=10" in caplog.text
    assert path.name in caplog.text


def test_damage_everywhere_is_an_error_that_lists_it(checkpoints):
    for name in names(checkpoints):
        (checkpoints / name / "weights" / "common.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"step=10(.|\n)*step=5(.|\n)*backup"):
        found_in(checkpoints, resume_ignore_no_checkpoint=True)


def test_a_damaged_path_is_an_error(checkpoints):
    (checkpoints / "step=5" / "weights" / "common.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"common\.pt: has 0 bytes"):
        AutoResume(resume_from_path=checkpoints / "step=5").setup(quiet_trainer())
    with pytest.raises(NotFoundError, match=r"Beside it there are: step=10, step=10-last, step=5"):
        AutoResume(resume_from_path=checkpoints / "step=7").setup(quiet_trainer())


def test_only_unfinished_ones_are_an_error(checkpoints):
    for name in names(checkpoints):
        (checkpoints / name / "manifest.json").unlink()
        (checkpoints / f"{name}-unfinished").touch()
    with pytest.raises(UnfinishedCheckpointError) as error:
        found_in(checkpoints)
    assert isinstance(error.value, ValueError)


def test_an_unfinished_newest_falls_back(checkpoints, caplog):
    for name in ("step=10", "step=10-last"):
        (checkpoints / name / "manifest.json").unlink()
        (checkpoints / f"{name}-unfinished").touch()
    assert found_in(checkpoints) == checkpoints / "step=5"
    assert "step=10-unfinished is beside it" in caplog.text


def _flip(checkpoint: Path, key: str) -> Path:
    """Change the last byte of the tensor ``key``; its file."""
    weights = checkpoint / "weights"
    (payload,) = places_of(weights, [key])[key]
    with (weights / payload.file).open("r+b") as file:
        file.seek(payload.header_start + len(payload.header) + payload.piece.nbytes - 1)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return weights / payload.file


def test_what_was_read_to_verify_it_is_not_read_again(finished, tmp_path):
    """The model that will be read into place is, and compared with its checksums once more."""
    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    name = "optimizer.0.state.net.2.weight.exp_avg"
    expected = read_tensors(finished / "step=10" / "weights")[name]
    trainer = quiet_trainer(max_steps=12)
    resumed = AutoResume(resume_from_path=directory / "step=10").setup(trainer)
    kept = trainer.strategy.checkpoint_io._kept[1].tensors
    assert kept.keys() == {key for key in described(directory / "step=10" / "weights") if key.startswith("optimizer.")}
    assert torch.equal(kept[name], expected)
    path = _flip(resumed.path, "state_dict.net.0.weight")
    with pytest.raises(
        DamagedCheckpointError, match=rf"{path.name}: its bytes .* have changed since they were written"
    ):
        trainer.fit(ToyModel(), loader(), loader())


def test_for_a_model_that_rewrites_what_is_loaded_nothing_is_read_twice(finished, tmp_path):
    """The checkpoint may even be damaged by the time that the fit loads it."""

    class Rewriting(ToyModel):
        def on_load_checkpoint(self, checkpoint):
            self.seen = {key: value.clone() for key, value in checkpoint["state_dict"].items()}

    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    model = Rewriting()
    trainer = quiet_trainer(max_steps=12)
    resumed = AutoResume(resume_from_path=directory / "step=10").setup(trainer, model)
    expected = load_model(finished / "step=10")
    for file in (resumed.path / "weights").glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    trainer.fit(model, loader(), loader())
    assert sorted(model.losses) == [10, 11]
    assert all(torch.equal(model.seen[key], value) for key, value in expected.items())
    with pytest.raises(NemologgerError):  # only once: what is on disk now counts
        trainer.strategy.checkpoint_io.load_checkpoint(str(resumed.path))


def test_what_has_changed_since_it_was_verified_is_named_before_or_while_the_model_is_overwritten(finished, tmp_path):
    for damage, is_partly_there in (("tensor", True), ("header", False), ("end", False)):
        directory = tmp_path / damage
        shutil.copytree(finished, directory)
        model = ToyModel()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        trainer = quiet_trainer(max_steps=12)
        resumed = AutoResume(resume_from_path=directory / "step=10").setup(trainer, model)
        if damage == "tensor":
            file = _flip(resumed.path, "state_dict.net.0.weight")
        else:
            (payload,) = places_of(resumed.path / "weights", ["state_dict.net.0.weight"])["state_dict.net.0.weight"]
            file = resumed.path / "weights" / payload.file
            content = bytearray(file.read_bytes())
            content[payload.header_start + 3] ^= 1
            file.write_bytes(content if damage == "header" else content[: payload.header_start + 9])
        with pytest.raises(DamagedCheckpointError) as error:
            trainer.fit(model, loader(), loader())
        assert str(file) in str(error.value)
        assert ("build the model anew" in str(error.value)) is is_partly_there
        if not is_partly_there:
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
