"""A training script with averaged weights: ``train_ema.py DIRECTORY STEPS [--beside]``, for torchrun.

Every rank writes its averages to ``DIRECTORY/averages-<rank>.pt`` when it is done.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from toy import ToyDataModule, ToyModel, quiet_trainer

import nemologger as nl
from nemologger.callbacks.ema import EMA


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--beside", action="store_true", help="async_save")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ema = EMA(0.9, every_n_steps=2)
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = quiet_trainer(
        max_steps=options.steps, devices=ranks, strategy="ddp", val_check_interval=2, callbacks=[ema]
    )
    ckpt = nl.ModelCheckpoint(filename="{step}", every_n_train_steps=2, save_top_k=1, async_save=options.beside)
    nl.train(
        ToyModel(),
        ToyDataModule(),
        trainer,
        nl.NeMoLogger(name="toy", log_dir=options.directory, ckpt=ckpt),
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
    )
    torch.save(ema.averages, options.directory / f"averages-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
