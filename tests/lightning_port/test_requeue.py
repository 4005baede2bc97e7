"""What Lightning does when Slurm is about to end a job, and what becomes of it."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port

FILE = "hpc_ckpt_1.ckpt"


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """One process of a job; there is no ``scontrol``."""
    given = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "PATH": str(tmp_path),
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)


class _Sends(pl.Callback):
    """Gets the signal in the first step; ``receive`` is to be told instead of Lightning."""

    def __init__(self, receive=None) -> None:
        self.receive = receive
        self.undo = lambda: None

    def setup(self, trainer, pl_module, stage):
        if self.receive is not None:
            self.undo = lightning_port.on_requeue_signal(trainer, self.receive)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            os.kill(os.getpid(), lightning_port.requeue_signal(trainer))

    def teardown(self, trainer, pl_module, stage):
        self.undo()


class _Leaves(pl.Callback):
    def __init__(self, own: str | None = None) -> None:
        self.own = own

    def setup(self, trainer, pl_module, stage):
        lightning_port.leave_requeue_files(trainer)
        if self.own is not None:
            lightning_port.go_on_from(trainer, self.own)


def _trainer(*callbacks: pl.Callback, steps: int = 4) -> pl.Trainer:
    return quiet_trainer(max_steps=steps, limit_val_batches=0, callbacks=[*callbacks], enable_checkpointing=False)


def _fit(*callbacks: pl.Callback, ckpt_path: str | None = None, steps: int = 4) -> list[int]:
    """The steps that were trained."""
    model = ToyModel()
    _trainer(*callbacks, steps=steps).fit(model, loader(), ckpt_path=ckpt_path)
    return [*model.losses]


@pytest.fixture
def file(slurm) -> Path:
    """What another run has left in the working directory after two steps."""
    trainer = _trainer(steps=2)
    trainer.fit(ToyModel(), loader())
    trainer.save_checkpoint(FILE)
    return Path(FILE).absolute()


@pytest.mark.usefixtures("slurm")
def test_lightning_saves_to_a_file_and_the_receiver_is_called_instead():
    received = []
    assert _fit(_Sends(lambda number, frame: received.append(number)), steps=1) == [0]
    assert received == [signal.SIGUSR1]
    assert not Path(FILE).exists()
    assert _fit(_Sends(), steps=1) == [0]
    assert Path(FILE).exists()


def test_without_slurm_there_is_no_such_signal():
    assert lightning_port.requeue_signal(quiet_trainer()) is None


@pytest.mark.usefixtures("file")
def test_lightning_loads_such_a_file_unasked_and_it_is_left_alone(caplog):
    assert _fit() == [2, 3]
    caplog.clear()
    trainer = _trainer(_Leaves())
    for steps in (2, 4):  # the first fit chooses before the callback has its turn
        model = ToyModel()
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(model, loader())
        assert [*model.losses] == [steps - 2, steps - 1]
        assert trainer.ckpt_path is None
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if f"{FILE} is not loaded" in text]) == 1


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_nor_is_it_loaded_to_be_validated(file, call):
    class Uses(ToyModel):
        def test_step(self, batch, batch_idx):
            pass

        def predict_step(self, batch, batch_idx):
            pass

    trainer = quiet_trainer(callbacks=[_Leaves()], enable_checkpointing=False)
    for _ in range(2):
        getattr(trainer, call)(Uses(), loader())
        assert trainer.ckpt_path is None


@pytest.mark.parametrize("how", ["hpc", "path", "attribute"])
def test_it_is_loaded_if_it_is_asked_for(file, how):
    model, trainer = ToyModel(), _trainer(_Leaves("not this"))
    if how == "attribute":
        trainer.ckpt_path = str(file)
    trainer.fit(model, loader(), ckpt_path={"hpc": "hpc", "path": str(file), "attribute": None}[how])
    assert [*model.losses] == [2, 3]


def test_the_fit_goes_on_from_its_own(file):
    file.rename("own.ckpt")
    Path(FILE).write_bytes(b"whoever loads this fails")
    assert _fit(_Leaves("own.ckpt")) == [2, 3]
