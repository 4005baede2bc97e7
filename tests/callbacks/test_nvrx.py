"""With the resiliency extension of NVIDIA, where it is installed; and what is said where it cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from processes import environment
from toy import ToyModel, loader, manifests, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint
from nemologger.callbacks import FaultTolerance, StragglerDetection, nvrx

SCRIPT = Path(__file__).parents[1] / "helpers" / "watched.py"
needs_extension = pytest.mark.skipif(
    find_spec("nvidia_resiliency_ext") is None, reason="nvidia-resiliency-ext is not installed"
)


@needs_extension
@pytest.mark.dist
def test_its_launcher_ends_a_rank_that_hangs_and_the_run_goes_on(tmp_path):
    """Nobody asks for it but the launcher; the file says that the run is complete."""
    finished = tmp_path / "finished"
    config = tmp_path / "config.yaml"  # as in a script's own, exp_manager's section among others
    config.write_text(
        "exp_manager:\n  fault_tolerance: {initial_rank_heartbeat_timeout: 90, rank_heartbeat_timeout: 8, "
        "workload_check_interval: 1, max_subsequent_job_failures: 1}\n"
    )
    settings = json.dumps({"max_subsequent_job_failures": 1})
    command = [
        sys.executable, "-m", "nvidia_resiliency_ext.fault_tolerance.launcher", "--standalone", "--nproc-per-node=2",
        "--max-restarts=1", f"--ft-cfg-path={config}", str(SCRIPT), str(tmp_path), "14",
        "--hangs", "1", "--at", "7", "--tolerate", settings,
    ]  # fmt: skip
    given = environment({"FAULT_TOL_FINISHED_FLAG_FILE": str(finished)})
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=240)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    assert "Did not get subsequent heartbeat. Waited 8.00 seconds" in said
    steps = {rank: [int(n) for n in (tmp_path / f"steps-{rank}.txt").read_text().split()] for rank in (0, 1)}
    assert steps == {0: [*range(8), *range(5, 14)], 1: [*range(7), *range(5, 14)]}
    assert (tmp_path / "toy" / "_ft_state.json").exists()  # the timeouts that it has learned
    assert finished.exists()
    assert not list(tmp_path.glob("toy/run_0/_ft_state.json"))


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is said that there is no CUDA")
def test_its_straggler_detection_says_what_it_lacks():
    trainer = quiet_trainer(max_steps=1, callbacks=[StragglerDetection(use_nvrx=True)])
    with pytest.raises(ConfigurationError, match="StragglerDetectionCallback of nvidia-resiliency-ext cannot be used"):
        trainer.fit(ToyModel(), loader(), loader())


@pytest.mark.parametrize("launched", [True, False])
def test_a_missing_extension_is_said_how_to_install(monkeypatch, launched):
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)  # also where it is installed
    monkeypatch.delitem(sys.modules, "nvidia_resiliency_ext.ptl_resiliency", raising=False)
    if launched:
        monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/nowhere")
    with pytest.raises(ConfigurationError, match="pip install nvidia-resiliency-ext"):
        FaultTolerance(use_nvrx=None if launched else True)
    assert not FaultTolerance(use_nvrx=False).use_nvrx


@pytest.mark.parametrize(
    ("launched", "arguments", "said"),
    [
        (False, {}, "not started by ft_launcher"),
        (True, {"max_subsequent_job_failures": 2}, "FAULT_TOL_FINISHED_FLAG_FILE is not in the environment"),
        pytest.param(
            True,
            {"simulated_fault": {"fault_type": "rank_hung", "base_delay": 1}},
            "there is no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_the_launcher_has_to_bring(monkeypatch, launched, arguments, said):
    monkeypatch.delenv("FAULT_TOL_FINISHED_FLAG_FILE", raising=False)
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    if launched:
        monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/nowhere")
    with pytest.raises(ConfigurationError, match=said):
        nvrx.check_launch(**{"simulated_fault": None, "max_subsequent_job_failures": 0, **arguments})


class StopsAsItDoes(Callback):
    """As the extension's straggler detection ends a run, and NeMo's callbacks."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            checkpoint = trainer.checkpoint_callback
            checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
            sys.exit(1)


def test_a_callback_that_saves_and_stops_saves_one_of_our_checkpoints(tmp_path):
    ckpt = ModelCheckpoint(monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    trainer = quiet_trainer(max_steps=9, callbacks=[StopsAsItDoes(), ckpt])
    with pytest.raises(SystemExit):
        trainer.fit(ToyModel(), loader(), loader())
    assert manifests(tmp_path)["step=5-last"].step == 5  # all there is has a manifest
