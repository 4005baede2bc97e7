"""A tracker that goes away in the middle of training: the run goes on, keeps its checkpoints and its exit code."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.mlflow_server import mlflow_runs, mlflow_server
from processes import environment

SCRIPT = Path(__file__).parent.parent / "train_outage.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """For all tests; the last one ends it."""
    with mlflow_server(tmp_path_factory.mktemp("server")) as started:
        yield started


def train(directory: Path, server, *arguments: str) -> subprocess.CompletedProcess[str]:
    uri, process = server
    (directory / "server.pid").write_text(str(process.pid))
    command = [sys.executable, str(SCRIPT), str(directory), uri, *arguments]
    # MLflow's own patience: four minutes for a server that is gone.
    env = {key: value for key, value in environment().items() if not key.startswith("MLFLOW")}
    return subprocess.run(command, env=env, cwd=directory, capture_output=True, text=True, timeout=200)


def logged(directory: Path) -> list[int]:
    with (directory / "outage" / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]


def checkpoints(directory: Path) -> set[str]:
    return {path.parent.name for path in (directory / "outage" / "checkpoints").glob("*/manifest.json")}


def test_a_server_that_hangs_and_comes_back_has_every_step_once(tmp_path, server):
    done = train(tmp_path, server, "--hangs")
    assert done.returncode == 0, done.stderr[-6000:]
    (run,) = mlflow_runs(server[0])
    assert sorted(step for name, step in run["metrics"] if name == "train_loss") == [*range(20)]
    assert run["status"] == "FINISHED"
    assert checkpoints(tmp_path) == {"step=10", "step=15", "step=20", "step=20-last"}
    assert done.stderr.count("Training goes on") == 1
    assert "MLFlowLogger has not answered for 1 s (metrics of step 4)" in done.stderr
    assert "Nothing is lost" in done.stderr


def test_trackers_that_are_gone_for_good_take_nothing_along_and_sigterm_is_what_the_run_ends_with(tmp_path, server):
    done = train(tmp_path, server, "--sigterm")
    assert done.returncode == 143, done.stderr[-6000:]
    assert logged(tmp_path) == [*range(9)]
    assert "step=9-last" in checkpoints(tmp_path)
    assert done.stderr.count("MLFlowLogger has not answered for 1 s (metrics of step 4). Training goes on") == 1
    assert "calls are lost: from metrics of step 4 to how the run has ended" in done.stderr
    assert done.stderr.count("WandbLogger fails (metrics of step 4)") == 1
