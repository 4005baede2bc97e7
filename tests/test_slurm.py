"""Processes that Slurm has started agree on one run directory, and train together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, free_port
from toy import ToyModel, names, quiet_trainer

import nemologger as nl

SCRIPT = """
import sys
from toy import ToyDataModule, ToyModel, quiet_trainer
import nemologger as nl

trainer = quiet_trainer(devices=2, strategy="ddp", max_steps=2, val_check_interval=2)
log = nl.NeMoLogger(name="x", log_dir=sys.argv[1], ckpt=nl.ModelCheckpoint(every_n_train_steps=2, filename="{step}"))
nl.train(ToyModel(), ToyDataModule(), trainer, log)
print("directory:", nl.run_of(trainer).log_dir)
"""


@pytest.mark.dist
def test_one_dated_directory_for_all_ranks(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "runs"],
            env=environment({**slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    seen = {line for output in outputs for line in output.splitlines() if line.startswith("directory:")}
    assert len(seen) == 1
    (version,) = names(tmp_path / "runs" / "x")
    assert "__1_0.distcp" in names(tmp_path / "runs" / "x" / version / "checkpoints" / "step=2-last" / "weights")


@pytest.mark.parametrize("ours", [True, False])
def test_what_lightning_is_about_to_load_is_said_where_it_saves(monkeypatch, caplog, ours):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, str(int(name == "SLURM_NTASKS")))
    Path("hpc_ckpt_1.ckpt").touch()
    checkpoint = nl.ModelCheckpoint(dirpath="checkpoints", save_weights_only=not ours)
    nl.AutoResume().setup(quiet_trainer(max_steps=1, callbacks=[checkpoint]), ToyModel())
    assert ("hpc_ckpt_1.ckpt: Lightning has left it there" in caplog.text) is not ours
