from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from processes import environment

from nemologger.trackers import ClearMLLogger
from nemologger.trackers.clearml import _title_and_series

MODEL = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from nemologger.run.directory import RunDirectory
from nemologger.trackers import ClearMLLogger

directory = Path(sys.argv[1])
checkpoint = directory / "step=1"
(checkpoint / "weights").mkdir(parents=True)
(checkpoint / "weights" / "w").write_text("w")
logger = ClearMLLogger(
    project="p", model_name="mine", tags=["t"], log_model=True, log_cfg=True, log_metrics=True, offline=True
)
logger.settle(RunDirectory(directory, directory, "demo", "v1"), move=True)
assert logger.name == "p"
logger.start_over()
logger.log_hyperparams({"net": {"width": 8}})
logger.log_metrics({"train/loss": 0.5, "bad": float("nan")}, 1)
logger.after_save_checkpoint(
    SimpleNamespace(best_k_models={}, best_model_path=str(checkpoint), last_model_path="")
)
logger.finalize("success")
assert "CLEARML_CACHE_DIR" not in os.environ
print("FOLDER", logger.experiment.get_offline_mode_folder())
sys.stdout.flush()
with logger.experiment._edit_lock:  # none of ClearML's threads is writing task.json now
    os._exit(0)  # at the end ClearML takes its ten seconds
"""


def test_an_offline_task(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MODEL, str(tmp_path)], env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    folder = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("FOLDER"))
    task = json.loads((tmp_path / folder / "task.json").read_text())
    assert (task["name"], task["project_name"]) == ("v1", "p")
    assert task["hyperparams"]["hyperparameters"]["net/width"]["value"] == "8"
    assert task["offline_output_models"] == []
    assert "log_model=True has no effect" in done.stderr
    events = [
        event for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines() for event in json.loads(line)
    ]
    scalars = {
        (event["metric"], event["variant"], event["iter"]) for event in events if event["type"].endswith("scalar")
    }
    assert scalars == {("train", "loss", 1), ("bad", "bad", 1)}


TWO_RUNS = """
import faulthandler, json, os, signal, sys
from pathlib import Path
from nemologger.run.directory import RunDirectory
from nemologger.trackers import ClearMLLogger

faulthandler.enable()
signals = [signal.SIGTERM, signal.SIGINT, signal.SIGABRT, signal.SIGSEGV, signal.SIGQUIT]
before = [signal.getsignal(number) for number in signals]
ids = []
for name, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):  # two runs, and the first one goes on
    directory = Path(sys.argv[1], name)
    directory.mkdir(exist_ok=True)
    logger = ClearMLLogger(project="p", task=name, offline=True)
    logger.settle(RunDirectory(directory, directory, "demo", name), move=True)
    again = bool(ids) and name == "a"
    assert logger.experiment.name == name
    assert [signal.getsignal(number) for number in signals] == before
    logger.go_on(1) if again else logger.start_over()
    logger.log_metrics({"loss": value}, 0)
    logger.log_metrics({"loss": value}, int(value))
    logger.finalize("success")
    assert (directory / "clearml_id.txt").read_text().strip() == logger.version
    ids.append(logger.version)
print("IDS", *ids)
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGSEGV)
signal.pause()
"""


def test_two_runs_of_a_process_are_two_tasks_and_signals_stay_what_they_are(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, str(tmp_path)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr[-4000:]
    assert "Fatal Python error: Segmentation fault" in done.stderr  # faulthandler, still
    a, b, again = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("IDS"))
    assert a == again != b
    scalars = {}
    for name, task in (("a", a), ("b", b)):
        lines = (tmp_path / name / "clearml" / "offline" / task / "metrics.jsonl").read_text().splitlines()
        events = [event for line in lines for event in json.loads(line)]
        scalars[name] = {(e["task"], e["iter"], e["value"]) for e in events if e["type"].endswith("scalar")}
    assert scalars == {"a": {(a, 0, 1.0), (a, 1, 1.0), (a, 3, 3.0)}, "b": {(b, 0, 2.0), (b, 2, 2.0)}}


@pytest.mark.parametrize(
    ("key", "expected"),
    [("loss", ("loss", "loss")), ("a/b/c", ("a/b", "c")), ("/x", ("/x", "/x")), ("x/", ("x/", "x/"))],
)
def test_titles_and_series(key, expected):
    assert _title_and_series(key) == expected


def test_an_option_without_effect_is_said(caplog):
    ClearMLLogger(log_cfg=True)
    assert "log_model is False" in caplog.text
