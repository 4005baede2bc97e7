"""A training script with every tracker: ``train_tracked.py DIRECTORY [--die-after STEP] [--server URI]``.

It logs the training loss at each of 20 steps and the validation loss every 5, saves every 10, resumes, and kills itself
after a step if it is told to.
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
from nemologger.trackers import ClearMLLogger, CometLogger, CSVLogger, DLLogger, MLFlowLogger


class Die(pl.Callback):
    """Kills the process after so many steps, when the trackers that write now and then have done so for the first ones."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.after - 4:
            time.sleep(6)
        if trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--server")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trackers = [CSVLogger(), DLLogger(), MLFlowLogger(experiment_name="toys", tags={"kind": "toy"})]
    wandb = None
    if options.server:
        trackers.append(
            MLFlowLogger(experiment_name="toys", run_name="served", tracking_uri=options.server, prefix="x")
        )
    if options.devices == 1:
        trackers.append(ClearMLLogger(project="toys", task="one", offline=True))
        trackers.append(CometLogger(project="toys", online=False, log_env_details=False, log_code=False))
        wandb = WandbLogger(project="toys", save_dir="wb", offline=True)
    trainer = quiet_trainer(
        max_steps=20,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        logger=True,
        log_every_n_steps=1,
        callbacks=[Die(options.die_after)] if options.die_after else [],
        use_distributed_sampler=False,
    )
    nl.train(
        ToyModel(width=options.width),
        ToyDataModule(),
        trainer,
        nl.NeMoLogger(
            name="tracked",
            log_dir=options.directory,
            ckpt=nl.ModelCheckpoint(filename="{step}", every_n_train_steps=10, save_top_k=2),
            wandb=wandb,
            extra_loggers=trackers,
        ),
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
    )


if __name__ == "__main__":
    main()
