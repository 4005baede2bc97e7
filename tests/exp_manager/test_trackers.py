"""What the trackers' fields change on disk. The trackers themselves have tests of their own; W&B and ClearML by a section
train in tests/test_migrate.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.run_section import by_call
from helpers.sections import NO_CKPT, bare_trainer, fit
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from nemologger.errors import ConfigurationError
from nemologger.exp_manager import exp_manager
from nemologger.run.record import close_log

FIXTURES = Path(__file__).parents[1] / "fixtures" / "exp_manager"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    monkeypatch.setenv("CLEARML_OFFLINE_MODE", "1")


def loggers_of(section):
    """The loggers that a trainer gets, which has not trained yet."""
    trainer = bare_trainer()
    exp_manager(trainer, {**NO_CKPT, **section})
    close_log(trainer)
    return trainer.loggers


def only(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def test_none(tmp_path):
    assert loggers_of({"exp_dir": tmp_path}) == []


@pytest.mark.parametrize("explicit", [False, True])
def test_tensorboard_is_on_by_itself_and_in_the_run_directory(tmp_path, explicit):
    where = {"explicit_log_dir": tmp_path / "run"} if explicit else {"exp_dir": tmp_path, "name": "n", "version": "v"}
    trainer = bare_trainer(max_steps=2, log_every_n_steps=1)
    section = {key: value for key, value in NO_CKPT.items() if key != "create_tensorboard_logger"}
    run = exp_manager(trainer, {**section, **where})
    fit(trainer)
    assert run == (tmp_path / "run" if explicit else tmp_path / "n" / "v")
    assert list(run.glob("events.out.tfevents.*"))


def test_summary_writer_kwargs(tmp_path):
    section = {"exp_dir": tmp_path, "create_tensorboard_logger": True, "summary_writer_kwargs": {"prefix": "p"}}
    (logger,) = loggers_of(section)
    assert type(logger) is TensorBoardLogger
    assert logger._prefix == "p"


@pytest.mark.parametrize("key", ["log_dir", "save_dir", "name", "version"])
def test_where_tensorboard_writes_is_not_among_them(key):
    with pytest.raises(ConfigurationError, match=rf"summary_writer_kwargs\.{key} cannot be set.*exp_dir"):
        loggers_of({"create_tensorboard_logger": True, "summary_writer_kwargs": {key: "x"}})


def test_wandb(tmp_path):
    kwargs = {"name": "n", "project": "p", "offline": True, "group": "g"}
    (logger,) = loggers_of({"exp_dir": tmp_path, "create_wandb_logger": True, "wandb_logger_kwargs": kwargs})
    assert type(logger) is WandbLogger
    assert (logger._wandb_init["name"], logger._wandb_init["project"], logger._wandb_init["group"]) == ("n", "p", "g")
    assert logger.save_dir == str(tmp_path)
    run = only(tmp_path / "default", "*")
    assert (run / "wandb_id.txt").read_text().strip() == logger._wandb_init["id"]


def test_wandb_elsewhere(tmp_path, caplog):
    caplog.set_level("INFO", "nemologger")
    for save_dir, expected in (("wb", tmp_path / "wb"), (str(tmp_path / "far"), tmp_path / "far")):
        kwargs = {"name": "n", "project": "p", "offline": True, "save_dir": save_dir}
        (logger,) = loggers_of({"exp_dir": tmp_path, "create_wandb_logger": True, "wandb_logger_kwargs": kwargs})
        assert logger.save_dir == str(expected)
    assert "wandb_logger_kwargs.save_dir is below the base directory" in caplog.text


def test_wandb_needs_a_name_or_a_project():
    with pytest.raises(ConfigurationError, match="wandb_logger_kwargs needs name and project"):
        loggers_of({"create_wandb_logger": True})


def test_mlflow_trains(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    _, run = by_call(FIXTURES / "mlflow.yaml")
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.tags["purpose"] == "test"
    assert "val_loss" in logged.data.metrics


def test_mlflow_is_called_as_the_run_if_nobody_says_otherwise(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/flow.db"
    section = {"exp_dir": tmp_path, "name": "quartz", "version": "v7", "create_mlflow_logger": True}
    kwargs = {"tracking_uri": uri, "prefix": "p", "artifact_location": str(tmp_path / "artifacts")}
    (logger,) = loggers_of({**section, "mlflow_logger_kwargs": kwargs})
    run_id = logger.run_id
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    logged = mlflow.MlflowClient(uri).get_run(run_id)
    assert logged.info.run_name == "v7"
    assert list(logged.data.metrics) == ["p-loss"]
    experiment = mlflow.MlflowClient(uri).get_experiment(logged.info.experiment_id)
    assert (experiment.name, experiment.artifact_location) == ("quartz", str(tmp_path / "artifacts"))
    kwargs = {"tracking_uri": uri, "run_id": run_id}
    (logger,) = loggers_of({**section, "version": "v8", "mlflow_logger_kwargs": kwargs})
    assert logger.run_id == run_id
    logger.finalize("success")


def test_dllogger_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, run = by_call(FIXTURES / "dllogger.yaml")
    lines = [json.loads(line.removeprefix("DLLL ")) for line in (run / "dllogger.json").read_text().splitlines()]
    assert any("val_loss" in line["data"] for line in lines if line["type"] == "LOG")
    assert "DLL " not in capsys.readouterr().out
    kwargs = {"stdout": True, "json_file": None}
    trainer = bare_trainer(max_steps=2, log_every_n_steps=1)
    section = {**NO_CKPT, "exp_dir": tmp_path / "out", "create_dllogger_logger": True, "dllogger_logger_kwargs": kwargs}
    exp_manager(trainer, section)
    fit(trainer)
    assert "DLL " in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("dllogger*.json"))


def test_all_that_clearml_takes(tmp_path):
    pytest.importorskip("clearml")
    kwargs = {
        "project": "p", "task": "t", "connect_pytorch": True, "model_name": "m", "tags": ["a"], "log_model": True,
        "log_cfg": True, "log_metrics": True,
    }  # fmt: skip
    (logger,) = loggers_of({"exp_dir": tmp_path, "create_clearml_logger": True, "clearml_logger_kwargs": kwargs})
    taken = (logger._project, logger._title, logger._connect_pytorch, logger._model_title, logger._tags)
    assert taken == ("p", "t", True, "m", ["a"])
    assert (logger._wants_model, logger._keeps_params, logger._keeps_metrics) == (True, True, True)
    assert not logger.is_open


def test_several_at_once(tmp_path):
    section = {
        "exp_dir": tmp_path,
        "create_tensorboard_logger": True,
        "create_dllogger_logger": True,
        "create_wandb_logger": True,
        "wandb_logger_kwargs": {"project": "p", "offline": True},
    }
    assert [type(logger).__name__ for logger in loggers_of(section)] == [
        "TensorBoardLogger", "WandbLogger", "DLLogger",
    ]  # fmt: skip


def test_neptune_has_closed(tmp_path):
    section = {
        "create_neptune_logger": True,
        "neptune_logger_kwargs": {"project": "p", "name": "n"},
        "exp_dir": tmp_path,
    }
    with pytest.raises(ConfigurationError, match=r"Neptune's service closed.*create_mlflow_logger"):
        loggers_of(section)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("parameters", "value"),
    [
        ("wandb_logger_kwargs", {"name": "n"}),
        ("mlflow_logger_kwargs", {"prefix": "p"}),
        ("dllogger_logger_kwargs", {"verbose": True}),
        ("clearml_logger_kwargs", {"task": "t"}),
        ("neptune_logger_kwargs", {"project": "p"}),
        ("summary_writer_kwargs", {"prefix": "p"}),
    ],
)
def test_parameters_of_a_tracker_that_is_off_are_reported(tmp_path, caplog, parameters, value):
    loggers_of({"exp_dir": tmp_path, parameters: value})
    assert f"exp_manager.{parameters} has no effect: create_" in caplog.text
