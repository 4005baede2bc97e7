"""Slow ranks are named."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger
from processes import torchrun
from toy import ToyModel, loader, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint
from nemologger.callbacks.straggler_detection import StragglerDetection
from nemologger.combination import VARIABLE, SweepJob

SCRIPT = Path(__file__).parents[1] / "helpers" / "watched.py"


def detect(directory: Path, steps: int, *arguments: object, **options: object):
    """Two ranks; what rank 0 has found, and the log."""
    settings = json.dumps({"report_time_interval": 0.7, "calc_individual_gpu_perf": False, **options})
    done = torchrun(SCRIPT, 2, directory, steps, "--pause", 0.01, "--every", 40, "--detect", settings, *arguments)
    return json.loads((directory / "detected.json").read_text()), done.stderr


@pytest.mark.dist
@pytest.mark.parametrize(("rank", "where"), [(1, "step"), (0, "data"), (0, "backward")])
def test_the_slow_one_of_two_ranks_is_named(tmp_path, rank, where):
    found, log = detect(tmp_path, 40, "--slow", rank, "--where", where, "--by", 0.1)
    assert found == {"step": 40, "ranks": [rank]}
    warnings = [line for line in log.splitlines() if "straggler: rank" in line]
    assert warnings
    assert all(f"straggler: rank {rank} on host" in line for line in warnings)
    for_data = float(warnings[-1].partition("by itself, ")[2].split()[0])
    assert (for_data > 90) is (where == "data")


@pytest.mark.dist
def test_training_stops_saved_and_goes_on(tmp_path):
    found, log = detect(tmp_path, 400, "--slow", 1, "--by", 0.1, stop_if_detected=True)
    assert found["ranks"] == [1]
    assert 5 < found["step"] < 300
    assert (tmp_path / "toy" / "checkpoints" / f"step={found['step']}-last").exists()
    assert "because of stragglers" in log
    again, log = detect(tmp_path, found["step"] + 5, "--every", 5, report_time_interval=60.0)
    assert again == {"step": found["step"] + 5, "ranks": []}
    first_life = [int(line) for line in (tmp_path / "steps-0.txt").read_text().split()]
    assert first_life == list(range(found["step"] + 5))


class Slower(ToyModel):
    """Slow from a step on."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.003 if self.global_step < 100 else 0.03)
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("clock")
def test_one_rank_against_its_own_best(tmp_path, caplog):
    callback = StragglerDetection(report_time_interval=0.15)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = quiet_trainer(max_steps=160, val_check_interval=160, callbacks=[callback], logger=logger)
    with caplog.at_level(logging.INFO, "nemologger"):
        trainer.fit(Slower(), loader(), loader())
    assert [(s.rank, "at its best" in s.reason, "as rank" in s.reason) for s in callback.detected] == [(0, True, False)]
    assert "straggler: rank 0 on host" in caplog.text
    header, *rows = (line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines())
    scores = [dict(zip(header, row, strict=True)) for row in rows]
    reports = [row for row in scores if row["gpu_individual_perf/min"]]
    assert len(reports) > 2
    assert all(float(row["gpu_relative_perf/median"]) == 1.0 for row in reports)
    assert float(reports[-1]["gpu_individual_perf/min"]) == pytest.approx(0.1)
    assert float(reports[0]["gpu_individual_perf/min"]) == 1.0


def test_the_model_is_left_as_it_was():
    model = ToyModel()
    quiet_trainer(max_steps=5, callbacks=[StragglerDetection()]).fit(model, loader(), loader())
    assert not model._forward_pre_hooks


def test_it_stops_after_an_optimizer_step_and_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "nemologger.callbacks.straggler_detection.stragglers",
        lambda *_: [SimpleNamespace(rank=0, host="h", reason="r")],
    )
    job = SweepJob("lr=0.1", 0, ("lr=0.1",), tmp_path / "record")
    job.directory.mkdir()
    monkeypatch.setenv(VARIABLE, job.dumps())
    callback = StragglerDetection(report_time_interval=1e-6, stop_if_detected=True)
    saves = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1000, monitor=None)
    trainer = quiet_trainer(max_steps=100, accumulate_grad_batches=3, callbacks=[callback, saves])
    trainer.fit(ToyModel(), loader(), loader())
    assert trainer.global_step == 2  # three batches of warm-up, and the next three
    assert {kept.step for kept in saves.shelf.kept} == {2}
    assert job.postponed() == "training was stopped at step 2 because of stragglers", "a sweep takes it for finished"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"report_time_interval": 0}, "report_time_interval=0"),
        ({"calc_relative_gpu_perf": False, "calc_individual_gpu_perf": False}, "nothing to detect by"),
        ({"gpu_relative_perf_threshold": 1.5}, "gpu_relative_perf_threshold=1.5"),
        ({"gpu_individual_perf_threshold": -1}, "gpu_individual_perf_threshold=-1"),
        ({"num_gpu_perf_scores_to_log": -1}, "num_gpu_perf_scores_to_log=-1"),
    ],
)
def test_arguments_that_cannot_work(arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        StragglerDetection(**arguments)


def test_a_missing_extension_is_said_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)  # also where it is installed
    monkeypatch.delitem(sys.modules, "nvidia_resiliency_ext.ptl_resiliency", raising=False)
    with pytest.raises(ConfigurationError, match="pip install nvidia-resiliency-ext"):
        StragglerDetection(use_nvrx=True)
