"""A training script with trackers that go away: ``train_outage.py DIRECTORY URI [--hangs | --sigterm]``.

The MLflow server at URI, whose process id is in DIRECTORY/server.pid, is stopped at step 4; with ``--sigterm`` W&B's process
too, for good.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from toy import ToyDataModule, ToyModel, quiet_trainer

import nemologger as nl
from nemologger.trackers import CSVLogger, MLFlowLogger, outbox


class Outage(pl.Callback):
    """Stops the server at step 4; ``sigterm``: and this process at step 8."""

    def __init__(self, server: int, *, hangs: bool, sigterm: bool) -> None:
        self.server, self.stop, self.sigterm = server, signal.SIGSTOP if hangs else signal.SIGKILL, sigterm

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4:
            os.killpg(self.server, self.stop)
            outbox.PATIENCE = 1.0
            if self.sigterm:
                end_wandb()
        if trainer.global_step == 8 and self.sigterm:
            os.kill(os.getpid(), signal.SIGTERM)
        if trainer.global_step == 12 and self.stop == signal.SIGSTOP:
            os.killpg(self.server, signal.SIGCONT)
            outbox.PATIENCE = 60.0


def end_wandb() -> None:
    """SIGKILL for the process that writes W&B's file, as when memory runs out."""
    for child in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, child.read_text().split()):
            if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                time.sleep(1)  # until the connection is known to be gone


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("uri")
    parser.add_argument("--hangs", action="store_true")
    parser.add_argument("--sigterm", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outbox.PATIENCE = 60.0  # however slow the machine is
    server = int((options.directory / "server.pid").read_text())
    trainer = quiet_trainer(
        max_steps=20,
        log_every_n_steps=1,
        callbacks=[Outage(server, hangs=options.hangs, sigterm=options.sigterm)],
    )
    tracker = MLFlowLogger(experiment_name="toys", tracking_uri=options.uri)
    nl.train(
        ToyModel(),
        ToyDataModule(),
        trainer,
        nl.NeMoLogger(
            name="outage",
            log_dir=options.directory,
            ckpt=nl.ModelCheckpoint(filename="{step}", every_n_train_steps=5),
            wandb=WandbLogger(project="toys", offline=True) if options.sigterm else None,
            extra_loggers=[tracker, CSVLogger()],
        ),
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
    )


if __name__ == "__main__":
    main()
