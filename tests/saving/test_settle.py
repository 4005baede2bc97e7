"""Which checkpoint callbacks a run has, and what NeMoLogger tells them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.logged_run import Tiny, data, trainers, working_directory  # noqa: F401  fixtures
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.testing._internal.two_tensor import TwoTensor
from toy import ToyModel, loader, quiet_trainer

import nemologger
from nemologger.errors import CheckpointError, ConfigurationError
from nemologger.logger import NeMoLogger
from nemologger.run.record import run_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Mine(ModelCheckpoint):
    pass


def test_the_callback_replaces_the_trainers_with_a_warning(make, caplog):
    trainer = make(callbacks=[theirs := Mine(monitor="loss")])
    NeMoLogger(ckpt=(ckpt := ModelCheckpoint())).setup(trainer)
    assert theirs not in trainer.callbacks
    assert trainer.checkpoint_callbacks == [ckpt]
    assert "Mine(monitor='loss') is replaced" in caplog.text


def test_the_one_that_lightning_adds_by_itself_is_replaced_in_silence(make, caplog):
    trainer = make()
    NeMoLogger(ckpt=(ckpt := ModelCheckpoint())).setup(trainer)
    assert trainer.checkpoint_callbacks == [ckpt]
    assert "replaced" not in caplog.text


def test_it_is_added_where_there_is_none_and_none_is_added_without_it(make):
    trainer = make(enable_checkpointing=False)
    NeMoLogger(ckpt=(ckpt := ModelCheckpoint())).setup(trainer)
    assert trainer.checkpoint_callbacks == [ckpt]
    trainer = make(enable_checkpointing=False)
    NeMoLogger().setup(trainer)
    assert trainer.checkpoint_callbacks == []


def test_several_of_the_trainers_get_the_run_directory(make):
    callbacks = [ModelCheckpoint(monitor="loss"), ModelCheckpoint(monitor="val/loss", dirpath="mine", filename="x")]
    trainer = make(callbacks=callbacks)
    run = NeMoLogger(name="n").setup(trainer)
    assert trainer.checkpoint_callbacks == callbacks
    assert callbacks[0].dirpath == str(run.checkpoint_dir)
    assert callbacks[0].filename == "n--{loss:.4f}-{epoch}-{step}"
    assert (Path(callbacks[1].dirpath).name, callbacks[1].filename) == ("mine", "x")


def test_checkpoints_come_after_all_that_training_does(make):
    class Late(Callback):
        pass

    trainer = make(callbacks=[ModelCheckpoint(), Late()])
    NeMoLogger().setup(trainer)
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    assert kinds[-2:] == ["ModelCheckpoint", "EndOfLog"]
    assert kinds.index("RunRecord") < kinds.index("ModelCheckpoint")


@pytest.mark.parametrize(
    ("monitor", "settings", "saved"),
    [
        ("val/loss", {"name": "n"}, r"n--val_loss=-?\d\.\d{4}-epoch=0-step=2\.ckpt"),
        ("loss", {"name": "n"}, r"n--loss=-?\d\.\d{4}-epoch=0-step=2\.ckpt"),
        (None, {"name": "n"}, r"n--epoch=0-step=2\.ckpt"),
        ("loss", {"explicit_log_dir": "mine"}, r"loss=-?\d\.\d{4}-epoch=0-step=2\.ckpt"),
    ],
)
def test_a_checkpoint_is_one_file_named_after_the_run(make, monitor, settings, saved):
    trainer = make(limit_train_batches=2, limit_val_batches=1)
    run = NeMoLogger(ckpt=ModelCheckpoint(monitor=monitor, every_n_epochs=1), **settings).setup(trainer)
    trainer.fit(Tiny(), data(), data())
    (path,) = run.checkpoint_dir.rglob("*")
    assert re.fullmatch(saved, path.name)


@pytest.mark.parametrize("given", [True, False])
def test_a_monitor_that_cannot_appear_is_an_error_before_anything_is_written(tmp_path, make, given):
    ckpt = ModelCheckpoint(monitor="val_loss")
    trainer = make(max_epochs=2, check_val_every_n_epoch=3, callbacks=[] if given else [ckpt])
    with pytest.raises(ConfigurationError, match=r"'val_loss'.*check_val_every_n_epoch=3.*max_epochs=2"):
        NeMoLogger(ckpt=ckpt if given else None).setup(trainer)
    assert not [*tmp_path.iterdir()]
    assert run_of(trainer) is None


def test_a_monitor_of_training_a_time_limit_and_a_trial_run_are_no_error(make):
    NeMoLogger(ckpt=ModelCheckpoint(monitor="loss")).setup(make(max_epochs=2, check_val_every_n_epoch=3))
    timed = make(max_steps=-1, max_time="00:01:00:00", check_val_every_n_epoch=2000)
    NeMoLogger(ckpt=ModelCheckpoint(monitor="val_loss")).setup(timed)
    trial = make(fast_dev_run=True, limit_val_batches=0)
    NeMoLogger(ckpt=ModelCheckpoint(monitor="val_loss"), tensorboard=TensorBoardLogger("tb")).setup(trial)
    trial.fit(Tiny(), data())
    assert not Path("nemo_experiments/tb").exists()


def test_a_model_that_no_checkpoint_can_hold_is_refused_before_the_first_batch(tmp_path):
    model = ToyModel()
    made = TwoTensor(torch.ones(2), torch.zeros(2))
    model.quantized = torch.nn.Parameter(made, requires_grad=False)
    trainer = quiet_trainer(max_steps=5, callbacks=[nemologger.ModelCheckpoint(dirpath=tmp_path)])
    with pytest.raises(CheckpointError, match=r"^state_dict\.quantized is a TwoTensor"):
        trainer.fit(model, loader(), loader())
    assert model.losses == {}
