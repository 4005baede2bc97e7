"""Lightning's loggers: moved, asked, and left as they were given."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from packaging.version import Version
from toy import ToyModel

from nemologger import lightning_port, trackers


def test_tensorboard_moves_and_keeps_its_settings(tmp_path):
    logger = TensorBoardLogger("x", name="n", prefix="p", default_hp_metric=False, sub_dir="s", max_queue=3)
    assert not lightning_port.is_open(logger)
    lightning_port.move_tensorboard(logger, tmp_path, "name", "v1")
    assert logger.log_dir == str(tmp_path / "name" / "v1" / "s")
    assert (logger._prefix, logger._default_hp_metric, logger._kwargs) == ("p", False, {"max_queue": 3})
    logger.log_metrics({"a": 1.0}, 0)
    assert lightning_port.is_open(logger)
    logger.finalize("success")


def test_wandb_moves_and_keeps_its_settings(tmp_path):
    logger = WandbLogger(name="n", project="p", offline=True, prefix="x", tags=["t"], save_dir="y", log_model=False)
    assert lightning_port.wandb_run_id(logger) is None
    lightning_port.move_wandb(logger, tmp_path, "abc")
    assert lightning_port.wandb_run_id(logger) == "abc"
    assert logger.save_dir == str(tmp_path)
    assert (logger._wandb_init["tags"], logger._wandb_init["name"], logger._offline) == (["t"], "n", True)


def test_who_logs_wandbs_checkpoints_can_be_said():
    asked = []
    logger = WandbLogger(log_model="all", checkpoint_name="mine")
    lightning_port.log_wandb_checkpoints_by(logger, asked.append)
    callback = ModelCheckpoint()
    logger.after_save_checkpoint(callback)
    assert asked == [callback]
    lightning_port.log_wandb_files(logger, callback)  # there are none, and nothing is opened
    assert lightning_port.wandb_artifact(logger) == "mine"
    assert not lightning_port.is_open(logger)


def test_wandb_writes_to_its_file_soon_unless_it_was_told_when(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    interval = "x_transaction_log_flush_interval"
    if Version(wandb.__version__) < Version("0.31"):
        pytest.skip("this W&B has no such setting")
    assert interval in wandb.Settings.model_fields
    mine = wandb.Settings(**{interval: 7.0})
    for given, expected in [
        ({}, {interval: 1.0}),
        ({"settings": {"silent": True}}, {"silent": True, interval: 1.0}),
        ({"settings": {interval: 5.0}}, {interval: 5.0}),
        ({"settings": mine}, mine),
    ]:
        logger = WandbLogger(offline=True, **given)
        lightning_port.move_wandb(logger, tmp_path, "abc")
        assert logger._wandb_init["settings"] == expected
    logger = WandbLogger(offline=True, settings=wandb.Settings(silent=True))
    lightning_port.move_wandb(logger, tmp_path, "abc")
    settings = logger._wandb_init["settings"]
    assert (settings.silent, getattr(settings, interval)) == (True, 1.0)
    assert {"silent", interval} <= settings.model_fields_set  # only those count for wandb.init
    monkeypatch.setenv("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "3")
    logger = WandbLogger(offline=True)
    lightning_port.move_wandb(logger, tmp_path, "abc")
    assert logger._wandb_init["settings"] is None


def test_what_wandb_calls_a_metric():
    assert lightning_port.wandb_metric(WandbLogger(offline=True), "loss") == "loss"
    assert lightning_port.wandb_metric(WandbLogger(offline=True, prefix="p"), "loss") == "p-loss"


def test_hyperparameters_without_nesting():
    params = {"a": {"b": 1, "c": [2, 3]}, "act": torch.nn.functional.relu, "model": ToyModel}
    assert lightning_port.flat_params(params) == {"a/b": 1, "a/c": [2, 3], "act": "relu", "model": "ToyModel"}


def test_which_arguments_lightnings_loggers_have():
    """A new argument would be lost when a logger is moved."""
    tensorboard = set(inspect.signature(TensorBoardLogger.__init__).parameters)
    assert tensorboard == {
        "self", "save_dir", "name", "version", "log_graph", "default_hp_metric", "prefix", "sub_dir", "kwargs",
    }  # fmt: skip
    wandb = set(inspect.signature(WandbLogger.__init__).parameters)
    assert wandb == {
        "self", "name", "save_dir", "version", "offline", "dir", "id", "anonymous", "project", "log_model", "experiment",
        "prefix", "checkpoint_name", "add_file_policy", "kwargs",
    }  # fmt: skip
    assert set(inspect.signature(MLFlowLogger.__init__).parameters) == set(
        inspect.signature(trackers.MLFlowLogger.__init__).parameters
    )
    assert set(inspect.signature(CometLogger.__init__).parameters) == set(
        inspect.signature(trackers.CometLogger.__init__).parameters
    )


def test_the_default_logger_is_recognised(tmp_path):
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path)
    assert lightning_port.is_default_logger(trainer, trainer.loggers[0])
    assert not lightning_port.is_default_logger(trainer, TensorBoardLogger(tmp_path, name="mine"))
    assert lightning_port.is_default_logger(trainer, CSVLogger(tmp_path))
