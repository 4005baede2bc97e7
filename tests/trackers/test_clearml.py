from __future__ import annotations

import json
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
from nemologger.run_dir import RunDirectory
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


@pytest.mark.parametrize(
    ("key", "expected"),
    [("loss", ("loss", "loss")), ("a/b/c", ("a/b", "c")), ("/x", ("/x", "/x")), ("x/", ("x/", "x/"))],
)
def test_titles_and_series(key, expected):
    assert _title_and_series(key) == expected


def test_an_option_without_effect_is_said(caplog):
    ClearMLLogger(log_cfg=True)
    assert "log_model is False" in caplog.text
