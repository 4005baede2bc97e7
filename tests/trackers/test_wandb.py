from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import WandbLogger

from nemologger.lightning_port import wandb_run_id
from nemologger.run.directory import RunDirectory
from nemologger.trackers import wandb


@pytest.fixture(autouse=True)
def no_id(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


def run_in(directory: Path) -> RunDirectory:
    return RunDirectory(directory, directory / "name", "name", None)


def test_the_id_is_kept_in_the_run_directory_for_the_next_life(tmp_path):
    first = wandb.run_id(tmp_path, [WandbLogger(offline=True)])
    assert (tmp_path / "wandb_id.txt").read_text() == f"{first}\n"
    assert wandb.run_id(tmp_path, [WandbLogger(offline=True)]) == first
    (tmp_path / "other").mkdir()
    assert wandb.run_id(tmp_path / "other", [WandbLogger(offline=True)]) != first


@pytest.mark.parametrize("argument", ["id", "version"])
def test_an_id_that_was_given_wins(tmp_path, argument):
    (tmp_path / "wandb_id.txt").write_text("kept\n")
    logger = WandbLogger(offline=True, **{argument: "given"})
    assert wandb.run_id(tmp_path, [logger]) == "given"
    wandb.move(logger, run_in(tmp_path), [], "kept", directory=True)
    assert wandb_run_id(logger) == "given"


def test_the_id_of_the_environment_wins_over_the_kept_one(tmp_path, monkeypatch):
    (tmp_path / "wandb_id.txt").write_text("kept\n")
    monkeypatch.setenv("WANDB_RUN_ID", "env")
    assert wandb.run_id(tmp_path, [WandbLogger(offline=True)]) == "env"


def test_it_writes_below_the_experiments_directory_and_keeps_its_settings(tmp_path):
    logger = WandbLogger(name="n", save_dir="wb", project="p", offline=True, prefix="x", tags=["t"], group="g")
    wandb.move(logger, run_in(tmp_path / "base"), [Path.cwd()], "abc", directory=True)
    assert logger.save_dir == str(tmp_path / "base" / "wb")
    assert (tmp_path / "base" / "wb").is_dir()
    assert (logger.name, wandb_run_id(logger), logger.version) == ("p", "abc", "abc")
    settings = logger._wandb_init
    assert (settings["name"], settings["tags"], settings["group"], settings["resume"]) == ("n", ["t"], "g", "allow")
    assert (logger._prefix, logger._offline) == ("x", True)


def test_its_directory_is_left_alone_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = WandbLogger(save_dir="wb", offline=True)
    wandb.move(logger, run_in(tmp_path / "base"), [tmp_path], "abc", directory=False)
    assert (logger.save_dir, wandb_run_id(logger)) == ("wb", "abc")
