"""Checkpoints as artifacts of trackers: what ``log_model`` uploads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import Logger
from processes import environment
from toy import ToyDataModule, ToyModel, manifests, quiet_trainer

import nemologger as nl
from nemologger.trackers.tracker import Uploaded, checkpoints_of

SCRIPT = Path(__file__).parents[1] / "helpers" / "uploads.py"


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uploads")
    for name in ("data", "cache"):
        (directory / name).mkdir()
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    own = {"WANDB_DATA_DIR": str(directory / "data"), "WANDB_CACHE_DIR": str(directory / "cache")}
    taken = {"MLFLOW_TRACKING_URI", "WANDB_RUN_ID", "NEMO_EXPM_VERSION"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(directory), "memory://uploads"],
        env={key: value for key, value in environment({**quiet, **own}).items() if key not in taken},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "output": done.stderr}


def test_wandb_gets_directories_whole_and_each_run_of_a_process_has_its_own(uploaded):
    each, at_the_end, in_a_store = uploaded["wandb"]
    assert [one["checkpoint"] for one in each] == ["step=2", "step=2-last", "step=4-last"]
    assert [one["checkpoint"] for one in at_the_end] == ["step=2", "step=4-last"]
    assert [one["aliases"] for one in at_the_end] == [["best", "latest"], ["latest"]]
    for one in each + at_the_end:
        assert one["name"] == "model-ID"
        assert one["files"] == uploaded["files"]
        assert {"manifest.json", "weights/.metadata", "weights/common.pt"} <= set(one["files"])
        assert one["copied"]
    assert in_a_store == []


def test_mlflow_gets_directories_too(uploaded):
    assert uploaded["mlflow"] == [["step=2", "step=4-last"], ["step=2", "step=4-last"], []]


def test_checkpoints_in_a_store_are_not_copied_and_that_is_said_once(uploaded):
    for tracker in ("WandbLogger", "MLFlowLogger"):
        assert uploaded["output"].count(f"{tracker}: log_model has no effect for the checkpoints in memory://") == 1


class Uploads(Logger):
    """Notes what is to be uploaded after each save."""

    name, version = "uploads", 0

    def __init__(self) -> None:
        super().__init__()
        self.uploaded, self.known, self.newest = [], Uploaded("T"), []

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def after_save_checkpoint(self, checkpoint_callback):
        checkpoint_callback.finish_removals()
        for path in self.known.new(checkpoint_callback):
            self.uploaded.append(path.name)
            self.known.add(path)
        self.newest.append(checkpoints_of(checkpoint_callback)[-1].name)


def test_a_checkpoint_that_has_lost_its_optimizer_is_neither_uploaded_again_nor_the_newest(tmp_path):
    checkpoint = nl.ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False,
        save_last_n_optim_states=1, monitor="train_loss",
    )  # fmt: skip
    uploads = Uploads()
    trainer = quiet_trainer(max_steps=5, limit_val_batches=0, callbacks=[checkpoint], logger=uploads)
    trainer.fit(ToyModel(), ToyDataModule())
    saved = [f"step={step}" for step in range(1, 6)]
    assert uploads.uploaded == uploads.newest == saved
    assert [manifest.has_optimizer for manifest in manifests(tmp_path).values()] == [False] * 4 + [True]
