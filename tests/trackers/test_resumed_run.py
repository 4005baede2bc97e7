"""One run with every tracker: killed at step 17, resumed from step 10, and read back from each tracker's own store."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.mlflow_server import mlflow_runs, mlflow_server
from processes import environment

from nemologger.trackers import wandb_file

SCRIPT = Path(__file__).parent.parent / "train_tracked.py"
STEPS = [*range(20)]
VALIDATED = [4, 9, 14, 19]
# Their files are not in the repository's tree, and nothing is sent.
QUIET = {"WANDB_SILENT": "true", "CLEARML_LOG_LEVEL": "ERROR", "GIT_PYTHON_REFRESH": "quiet"}


def train(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    taken = {"MLFLOW_TRACKING_URI", "WANDB_RUN_ID", "WANDB_MODE", "CLEARML_OFFLINE_MODE", "COMET_START_ONLINE"}
    env = {key: value for key, value in environment(QUIET).items() if key not in taken}
    command = [sys.executable, str(SCRIPT), str(directory), *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=directory, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tracked")
    with mlflow_server(directory) as (uri, _):
        killed = train(directory, "--die-after", 17, "--server", uri)
        assert killed.returncode == -9, killed.stderr[-4000:]
        run = directory / "tracked"
        lost = (run / "metrics.csv").read_text()
        as_killed = tmp_path_factory.mktemp("killed") / "copy"
        shutil.copytree(directory, as_killed, symlinks=True)
        finished = train(directory, "--server", uri, "--width", 8)
        assert finished.returncode == 0, finished.stderr[-6000:]
        yield SimpleNamespace(
            run=run, exp=directory, uri=uri, csv_when_killed=lost, as_killed=as_killed, output=finished.stderr
        )


def once(logged: list[tuple[str, int]]) -> None:
    assert [step for name, step in logged if name == "train_loss"] == STEPS
    assert [step for name, step in logged if name == "val_loss"] == VALIDATED


@pytest.fixture(scope="module")
def begun_again(resumed, tmp_path_factory):
    """The same directory, used again by a run that starts at step 0: its checkpoints are gone."""
    directory = tmp_path_factory.mktemp("again") / "copy"
    shutil.copytree(resumed.exp, directory, symlinks=True)
    shutil.rmtree(directory / "tracked" / "checkpoints")
    done = train(directory, "--width", 9)
    assert done.returncode == 0, done.stderr[-6000:]
    return SimpleNamespace(run=directory / "tracked", output=done.stderr)


def test_it_was_killed_after_its_last_checkpoint(resumed):
    assert resumed.csv_when_killed.splitlines()[-1].startswith("16,")
    assert "Restored all states from the checkpoint at" in resumed.output


def test_csv(resumed):
    with (resumed.run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    once([(name, int(row["step"])) for row in rows for name in ("train_loss", "val_loss") if row[name]])
    assert yaml.safe_load((resumed.run / "hparams.yaml").read_text())["width"] == 8
    # Bit for bit what the first life had logged, where both did.
    assert (resumed.run / "metrics.csv").read_text().startswith(resumed.csv_when_killed)


def test_dllogger(resumed):
    entries = []
    for line in (resumed.run / "dllogger.json").read_text().splitlines():
        assert line.startswith("DLLL ")
        entries.append(json.loads(line[len("DLLL ") :]))
    assert all([*e] == ["timestamp", "datetime", "elapsedtime", "type", "step", "data"] for e in entries)
    for entry in entries:
        logged = datetime.fromisoformat(entry["datetime"])
        assert float(entry["timestamp"]) == pytest.approx(logged.timestamp(), abs=1e-3)
        assert 0 <= float(entry["elapsedtime"]) < 300
    parameters = [e for e in entries if e["step"] == "PARAMETER"]
    assert [e["data"]["width"] for e in parameters] == [8]  # once, as they have not changed
    once([(name, e["step"]) for e in entries if e not in parameters for name in e["data"]])


@pytest.mark.parametrize("store", ["in the run directory", "server"])
def test_mlflow(resumed, store):
    prefix = "x-" if store == "server" else ""
    uri = resumed.uri if store == "server" else f"sqlite:///{resumed.run}/mlruns/mlflow.db"
    (run,) = mlflow_runs(uri)
    once([(name.removeprefix(prefix), step) for name, step in run["metrics"]])
    assert run["status"] == "FINISHED"
    assert run["params"]["width"] == "8"
    ids = dict(reversed(line.split(" ", 1)) for line in (resumed.run / "mlflow_id.txt").read_text().splitlines())
    assert ids[f"{'here' if store != 'server' else resumed.uri} toys"] == run["id"]
    if store == "server":
        assert run["tags"]["mlflow.runName"] == "served"
    else:
        assert run["tags"]["kind"] == "toy"
        assert run["artifacts"].startswith((resumed.run / "mlruns" / "artifacts").as_uri())


def test_wandb(resumed):
    run_id = (resumed.run / "wandb_id.txt").read_text().strip()
    lives = sorted((resumed.exp / "wb" / "wandb").glob("offline-run-*"))
    assert [life.name.endswith(run_id) for life in lives] == [True, True]
    rows = [row for life in lives for row in wandb_file.history(life / f"run-{run_id}.wandb")]
    once([(name, row["trainer/global_step"]) for row in rows for name in row])
    assert [row["_step"] for row in rows] == [*range(len(rows))]  # W&B's own count goes on, too
    assert b"width" in (lives[-1] / f"run-{run_id}.wandb").read_bytes()


def test_clearml(resumed):
    (task_id,) = (resumed.run / "clearml_id.txt").read_text().split()
    folder = resumed.run / "clearml" / "offline" / task_id
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [task_id]
    task = json.loads((folder / "task.json").read_text())
    assert (task["id"], task["name"], task["project_name"]) == (task_id, "one", "toys")
    assert task["hyperparams"]["hyperparameters"]["width"]["value"] == "8"
    with zipfile.ZipFile(folder.with_suffix(".zip")) as archive:  # what import_offline_session takes
        lines = archive.read("metrics.jsonl").decode().splitlines()
    events = [event for line in lines for event in json.loads(line)]
    assert {event["task"] for event in events} == {task_id}
    scalars = [event for event in events if event["type"] == "training_stats_scalar"]
    once([(event["metric"], event["iter"]) for event in scalars])


def test_comet(resumed):
    (key,) = (resumed.run / "comet_id.txt").read_text().split()
    archives = sorted((resumed.run / "comet").glob("*.zip"), key=os.path.getmtime)
    assert len(archives) == 2  # what the killed life had logged, and the second life
    assert not [*(resumed.run / "comet" / "unfinished").glob("*/*/messages.json")]
    metrics, parameters = [], Counter()
    for archive in archives:
        with zipfile.ZipFile(archive) as files:
            assert json.loads(files.read("experiment.json"))["offline_id"] == key
            assert json.loads(files.read("experiment.json"))["resume_strategy"] == "get_or_create"
            messages = [json.loads(line) for line in files.read("messages.json").splitlines()]
        metrics += [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
        parameters.update(m["payload"]["param"]["paramName"] for m in messages if m["type"] == "parameter_msg")
    once([(metric["metricName"], metric["step"]) for metric in metrics])
    assert parameters["width"] >= 1


def test_tensorboard(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed.run), size_guidance={"scalars": 0})
    events.Reload()
    once([(name, event.step) for name in ("train_loss", "val_loss") for event in events.Scalars(name)])


def test_a_run_that_starts_again_at_step_0_leaves_the_earlier_one_as_it_is(resumed, begun_again):
    run = begun_again.run
    for name in ("metrics.csv", "dllogger.json"):
        assert (run / name).with_stem(f"{Path(name).stem}-0").read_text() == (resumed.run / name).read_text()
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    once([(name, int(row["step"])) for row in rows for name in ("train_loss", "val_loss") if row[name]])
    assert '"width": 9' in (run / "dllogger.json").read_text()
    new, old = mlflow_runs(f"sqlite:///{run}/mlruns/mlflow.db")
    assert (old["params"]["width"], new["params"]["width"]) == ("8", "9")
    assert (old["status"], new["status"]) == ("FINISHED", "FINISHED")
    once([(name, step) for name, step in old["metrics"]])
    once([(name, step) for name, step in new["metrics"]])
    for tracker in ("clearml", "comet"):
        ids = [(place / f"{tracker}_id.txt").read_text().split()[0] for place in (resumed.run, run)]
        assert ids[0] != ids[1]
    folder = run / "clearml" / "offline" / (run / "clearml_id.txt").read_text().strip()
    events = [event for line in (folder / "metrics.jsonl").read_text().splitlines() for event in json.loads(line)]
    once([(event["metric"], event["iter"]) for event in events])
    assert json.loads((folder / "task.json").read_text())["hyperparams"]["hyperparameters"]["width"]["value"] == "9"
    assert "training starts at step 0: ClearML task" in begun_again.output


@pytest.mark.dist
def test_with_two_ranks_the_first_one_writes(resumed):
    run = resumed.as_killed / "tracked"
    finished = train(resumed.as_killed, "--devices", 2)
    assert finished.returncode == 0, finished.stderr[-6000:]
    assert len([*run.glob("nemo_log_globalrank-*")]) == 2
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == STEPS
    entries = [json.loads(line[len("DLLL ") :]) for line in (run / "dllogger.json").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "train_loss" in entry["data"]] == STEPS
    (mlflow,) = mlflow_runs(f"sqlite:///{run}/mlruns/mlflow.db")
    assert [step for name, step in mlflow["metrics"] if name == "train_loss"] == STEPS
