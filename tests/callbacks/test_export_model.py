"""The exported file; what exp_manager makes of its fields is in tests/exp_manager/test_checkpoint_params.py."""

from __future__ import annotations

import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from toy import Scored, ToyDataModule, quiet_trainer

import nemologger as nl
from nemologger.callbacks import ExportModel
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import read
from nemologger.checkpoint.reading.load import load_model
from nemologger.disk import LocalDisk
from nemologger.errors import ConfigurationError
from nemologger.stores.path import storage_path


def train(tmp_path, callback, steps=3, **options):
    ckpt = options.pop("ckpt", None) or nl.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=1)
    trainer = quiet_trainer(max_steps=steps, val_check_interval=1, callbacks=[callback, ckpt], **options)
    model = Scored(scores=[2.0, 1.0, 3.0])
    trainer.fit(model, datamodule=ToyDataModule())
    return model


def test_it_works_in_any_trainer(tmp_path):
    model = train(tmp_path, ExportModel("m", ".pt"))
    exported = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(torch.equal(value, exported[key]) for key, value in model.state_dict().items())


def test_what_is_exported_is_a_whole_file_and_is_replaced(tmp_path):
    (tmp_path / "m.pt").write_bytes(b"old")
    train(tmp_path, ExportModel("m", ".pt", best=True, always=True))
    assert set(torch.load(tmp_path / "m.pt", weights_only=True)) == set(Scored(scores=[1.0]).state_dict())
    assert not list(tmp_path.glob("*.partial"))


def test_it_is_not_taken_for_a_checkpoint(tmp_path):
    train(tmp_path, ExportModel("m-last", ".pt"))
    found = nl.AutoResume(resume_from_directory=tmp_path).setup(quiet_trainer(max_steps=9))
    assert found.path.name.endswith("step=3-last")
    with pytest.raises(ConfigurationError, match="taken for a checkpoint"):
        ExportModel("m", ".ckpt")


@pytest.mark.parametrize("clock", [range(9), range(9, 0, -1)], ids=["", "that is set back"])
def test_without_a_last_checkpoint_the_newest_one_is_exported(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(manifests, "now", iter(map(float, clock)).__next__)
    ckpt = nl.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, save_last=False)
    model = train(tmp_path, ExportModel("m", ".pt"), ckpt=ckpt)
    exported = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(torch.equal(value, exported[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("save_last", [True, False])
def test_in_a_store_too_the_last_one_is_exported_and_not_the_best(save_last):
    store = storage_path("memory://exports")
    ckpt = nl.ModelCheckpoint(dirpath=str(store), every_n_train_steps=1, save_top_k=3, save_last=save_last)
    try:
        model = train(None, ExportModel("m", ".pt"), ckpt=ckpt)
        exported = torch.load(BytesIO((store / "m.pt").read_bytes()), weights_only=True)
    finally:
        get_filesystem("memory://exports").rm("/exports", recursive=True)
    assert ckpt.best_model_path.endswith("step=2")
    assert all(torch.equal(value, exported[key]) for key, value in model.state_dict().items())


class _SlowToTakeOver(LocalDisk):
    """Leaves a checkpoint that gives up its optimizer state without its name for a while."""

    def __init__(self) -> None:
        self.began = threading.Event()

    def rename(self, source, target):
        if source.name.endswith(".partial"):
            self.began.set()
            time.sleep(0.5)
        super().rename(source, target)


class _WhenItBegins(ExportModel):
    def on_fit_end(self, trainer, pl_module):
        assert trainer.checkpoint_callback._given_disk.began.wait(30)
        super().on_fit_end(trainer, pl_module)


def test_the_best_is_exported_though_it_gives_up_its_optimizer_state_at_that_moment(tmp_path):
    ckpt = nl.ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=1, save_top_k=1, save_last_n_optim_states=0, disk=_SlowToTakeOver()
    )
    train(tmp_path, _WhenItBegins("m", ".pt", best=True), ckpt=ckpt)
    assert not read(Path(ckpt.best_model_path)).has_optimizer
    exported, best = torch.load(tmp_path / "m.pt", weights_only=True), load_model(Path(ckpt.best_model_path))
    assert all(torch.equal(value, exported[key]) for key, value in best.items())


@pytest.mark.parametrize("checkpoints", [False, True], ids=["none", "Lightning's"])
def test_without_checkpoints_of_ours_there_is_nothing_to_export(tmp_path, checkpoints):
    """Said before training, not behind it."""
    trainer = quiet_trainer(
        max_steps=1, enable_checkpointing=checkpoints, callbacks=[ExportModel()], default_root_dir=tmp_path
    )
    model = Scored(scores=[1.0])
    with pytest.raises(ConfigurationError, match="the trainer has none"):
        trainer.fit(model, datamodule=ToyDataModule())
    assert model.losses == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": "", "postfix": ""}, "name of one file"),
        ({"prefix": "a/b"}, "name of one file"),
        ({"at_end": False}, "never exports"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        ExportModel(**arguments)
