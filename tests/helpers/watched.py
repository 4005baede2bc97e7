"""A training script for the callbacks that watch ranks: ``watched.py DIRECTORY STEPS [--option value ...]``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from toy import BATCH, ToyData, ToyDataModule, ToyModel, quiet_trainer

import nemologger as nl
from nemologger.callbacks.fault_tolerance import FaultTolerance
from nemologger.callbacks.straggler_detection import StragglerDetection


class SlowData(ToyData):
    """Takes its time for each sample."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().__getitem__(index)


class Troubled(ToyModel):
    """One rank is slow, or hangs at a step, in its first life."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options

    def _is(self, rank: int | None) -> bool:
        return rank == self.global_rank

    def training_step(self, batch, batch_idx):
        time.sleep(self.options.pause)
        if self._is(self.options.slow) and self.options.where == "step":
            time.sleep(self.options.by)
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self._is(self.options.hangs) and self.global_step == self.options.at and first_life:
            if self.options.how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif self.options.how == "sleep":
                time.sleep(3600)
            else:  # deaf: only SIGKILL ends it
                signal.signal(signal.SIGTERM, lambda *_: None)
                while True:
                    time.sleep(3600)
        (self.options.directory / f"steps-{self.global_rank}.txt").open("a").write(f"{self.global_step}\n")
        return super().training_step(batch, batch_idx)

    def backward(self, loss):
        if self._is(self.options.slow) and self.options.where == "backward":
            loss.register_hook(lambda gradient: time.sleep(self.options.by))
        super().backward(loss)

    def validation_step(self, batch, batch_idx):
        time.sleep(self.options.validation)
        super().validation_step(batch, batch_idx)


class Data(ToyDataModule):
    """Slow on one rank, if told so."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options

    def train_dataloader(self):
        slow = self.options.where == "data" and self.options.slow == self.trainer.global_rank
        return DataLoader(SlowData(self.options.by / BATCH if slow else 0.0), batch_size=BATCH)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.0, help="of every rank, in each step")
    parser.add_argument("--slow", type=int, help="a rank")
    parser.add_argument("--where", default="step")
    parser.add_argument("--by", type=float, default=0.03)
    parser.add_argument("--hangs", type=int, help="a rank")
    parser.add_argument("--how", default="sleep")
    parser.add_argument("--at", type=int, default=-1)
    parser.add_argument("--validation", type=float, default=0.0)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--detect", type=json.loads, help="arguments of StragglerDetection")
    parser.add_argument("--tolerate", type=json.loads, help="arguments of FaultTolerance")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    torch.set_num_threads(1)
    options.directory.mkdir(parents=True, exist_ok=True)
    callbacks = []
    if options.detect is not None:
        callbacks.append(StragglerDetection(**options.detect))
    if options.tolerate is not None:
        callbacks.append(FaultTolerance(**options.tolerate))
    trainer = quiet_trainer(
        max_steps=options.steps,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        val_check_interval=options.every,
        callbacks=callbacks,
        use_distributed_sampler=False,
    )
    nl.train(
        Troubled(options),
        Data(options),
        trainer,
        nl.NeMoLogger(
            name="toy",
            log_dir=options.directory,
            ckpt=nl.ModelCheckpoint(filename="{step}", every_n_train_steps=options.every, save_top_k=2),
        ),
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
    )
    if options.detect is not None and trainer.is_global_zero:
        (options.directory / "detected.json").write_text(
            json.dumps({"step": trainer.global_step, "ranks": [s.rank for s in callbacks[0].detected]})
        )


if __name__ == "__main__":
    main()
