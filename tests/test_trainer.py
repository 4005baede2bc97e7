"""Lightning's Trainer, whose arguments are captured."""

from __future__ import annotations

import inspect
import pickle

import ctxmod
import lightning.pytorch as pl
import pytest
import torch
from processes import free_port
from toy import ToyModel, loader, quiet_trainer

from nemologger import ModelCheckpoint
from nemologger.io import load_context, reinit
from nemologger.trainer import Trainer

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def test_the_trainer_has_lightnings_signature_and_nothing_else():
    assert inspect.signature(Trainer) == inspect.signature(pl.Trainer)
    added = {name for name in vars(Trainer) if not name.startswith("__")}
    assert not added
    assert issubclass(Trainer, pl.Trainer)


def test_the_trainer_takes_defaults_from_the_environment_as_lightning_does(monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "7")
    trainer = Trainer(**QUIET)
    assert trainer.max_steps == 7
    assert "max_steps" not in trainer.__io__.__arguments__


def test_the_trainer_refuses_what_lightning_refuses():
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_stepz'"):
        Trainer(max_stepz=1)


@pytest.mark.usefixtures("quiet_loaders")
def test_the_trainer_trains_as_lightnings_does():
    losses = []
    for kind in (pl.Trainer, Trainer):
        torch.manual_seed(0)
        model = ctxmod.SpawnedModel(ctxmod.Cfg())
        kind(max_steps=2, **QUIET).fit(model, datamodule=ctxmod.SpawnedData())
        losses.append(model.layer.weight.item())
    assert losses[0] == losses[1]


def test_the_trainer_alone_reads_checkpoint_directories(tmp_path):
    trained = ToyModel()
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(trained, loader(), loader())
    fresh = ToyModel()
    quiet_trainer(enable_checkpointing=False).validate(fresh, loader(), ckpt_path=str(tmp_path / "x"))
    assert all(map(torch.equal, fresh.state_dict().values(), trained.state_dict().values()))


def test_the_trainer_and_its_model_can_be_pickled_for_other_processes():
    trainer = pickle.loads(pickle.dumps(Trainer(max_steps=3, limit_val_batches=0.5, **QUIET)))
    assert trainer.max_steps == 3
    assert trainer.__io__.limit_val_batches == 0.5
    assert reinit(trainer).max_steps == 3


@pytest.mark.dist
@pytest.mark.usefixtures("quiet_loaders")
def test_a_spawned_run_writes_its_context(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    trainer = Trainer(max_steps=1, devices=2, strategy="ddp_spawn", callbacks=[], **QUIET)
    trainer.callbacks.append(ctxmod.DumpsOnce(str(tmp_path)))
    model, data = ctxmod.SpawnedModel(ctxmod.Cfg(dim=3)), ctxmod.SpawnedData(seq_length=7)
    trainer.fit(model, datamodule=data)
    context = load_context(tmp_path)
    assert context.model.config.dim == 3
    assert context.extra["datamodule"].seq_length == 7
    assert context.trainer.max_steps == 1
