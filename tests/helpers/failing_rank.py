"""Two ranks train and save; rank 1 fails, in its second save or in a step: ``failing_rank.py DIRECTORY HOW``.

Each rank writes how it ended into ``DIRECTORY/end-<rank>.json``.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch import Callback
from processes import wait_for
from toy import ToyModel, loader, quiet_trainer

from helpers.kill_loop import writers
from helpers.sharded import FSDPOnCPU
from nemologger import ModelCheckpoint
from nemologger.callbacks import EMA
from nemologger.callbacks.exact_resume import ExactResume
from nemologger.checkpoint.writing import in_flight
from nemologger.disk import LocalDisk
from nemologger.saving import saves

TIMEOUT = 6.0
STEPS = 6


class FailingDisk(LocalDisk):
    """Its owner fails when it writes its share of the second checkpoint."""

    def __init__(self, how: str) -> None:
        self.how = how

    def write(self, path, parts):
        if self.how and path.parent.parent.name == "step=4" and path.suffix == ".distcp":
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            wait_for((path.parents[3] / "end-0.json").exists)  # rank 0 has given up
        super().write(path, parts)


class Raises(Callback):
    """Its owner stops after the third step."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.how == "raises" and trainer.global_step == 3:
            raise ZeroDivisionError("only here")


class FailingHook(Callback):
    """Its owner cannot say what its state is after the fourth step."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.step = fails, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.step = trainer.global_step

    def state_dict(self):
        if self.fails and self.step == 4:
            raise ZeroDivisionError("no state")
        return {"step": self.step}


class LosesItsWriter(Callback):
    """The writer process of its owner dies in the first save; the next one is due when that has been seen.

    Or it dies before the first save, and the next one hangs in the second, where nothing is seen.
    """

    def __init__(self, sent: dict[int, int]) -> None:
        self.sent = sent

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.sent:
            checkpoint = trainer.checkpoint_callback
            while self.sent[trainer.global_step] == signal.SIGSTOP and not checkpoint._keeper._beside.over:
                checkpoint._poll(trainer)  # what it has begun is done
                time.sleep(0.01)
            for pid in writers(os.getpid()):
                os.kill(pid, self.sent[trainer.global_step])
            while self.sent[trainer.global_step] == signal.SIGKILL and checkpoint._keeper._beside._equipment.has_writer:
                time.sleep(0.01)
        time.sleep(0.4 if trainer.global_step > 1 else 0)


#: What the writer of rank 1 is sent, before which step.
WRITERS = {
    "loses its writer": {1: signal.SIGSTOP, 2: signal.SIGKILL},
    "writer hangs": {1: signal.SIGKILL, 3: signal.SIGSTOP},
}


def start_late(directory: Path) -> None:
    """The first process that this one starts takes longer to start than the ranks wait for each other."""
    slow = directory / "slow-python"
    slow.write_text(f'#!/bin/sh\nmkdir "$0.once" 2>/dev/null && sleep {TIMEOUT + 2:g}\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    sys.executable = str(slow)


class FailingModel(ToyModel):
    """The same, of a model."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def on_save_checkpoint(self, checkpoint):
        if self.fails and self.global_step == 4:
            raise ZeroDivisionError("no state")


class Signalled(ToyModel):
    """Gets a signal in the middle of its owner's step, before the gradients of the ranks are summed."""

    def __init__(self, number: int | None, step: int) -> None:
        super().__init__()
        self.number, self.step = number, step

    def training_step(self, batch, batch_idx):
        if self.number is not None and self.global_step == self.step:
            os.kill(os.getpid(), self.number)
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)


#: How long the ranks wait for each other.
TIMEOUTS = {"killed": TIMEOUT, "late": TIMEOUT, "writer hangs": TIMEOUT, "raises": 10.0}

# What the ranks are sent.
SIGNALS = {"dies": (None, signal.SIGKILL), "stops": (None, signal.SIGTERM), "both stop": (signal.SIGTERM,) * 2}


def main(directory: Path, how: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    logging.basicConfig(filename=directory / f"log-{rank}.txt")
    in_flight.STALLED = TIMEOUT
    saves._ANSWER = 60.0
    if how == "writer hangs" and rank == 1:
        start_late(directory)
    ckpt = ModelCheckpoint(
        monitor=None,
        dirpath=directory / "checkpoints",
        filename="{step}",
        every_n_train_steps=3 if how == "settings" and rank == 1 else 2,
        save_last=False,
        async_save=how in SIGNALS or how in ("hook beside", *WRITERS),
        on_busy="skip" if how == "loses its writer" else "wait",
        save_on_exception=how == "raises",
        save_on_sigterm=how != "both stop",
        rank_timeout=timedelta(seconds=TIMEOUTS.get(how, 60.0)),
        disk=FailingDisk(how if rank == 1 else ""),
    )
    trainer = quiet_trainer(
        max_steps=STEPS if how not in SIGNALS else 100,
        devices=2,
        strategy=FSDPOnCPU() if "FSDP" in how else "ddp",
        callbacks=[
            FailingHook("callback" in how and rank == 1),
            ExactResume(),
            ckpt,
            Raises(how if rank == 1 else ""),
            *[EMA()] * ("EMA" in how),
            *[LosesItsWriter(WRITERS.get(how, {}) if rank == 1 else {})] * (how in WRITERS),
        ],
        limit_val_batches=0,
    )
    if how in SIGNALS:
        try:
            trainer.fit(Signalled(SIGNALS[how][rank], 3 - rank), loader())
        finally:
            (directory / f"end-{rank}.json").write_text(json.dumps({"step": trainer.global_step}))
        return
    end = {"error": "", "message": "", "seconds": 0.0}
    started = time.monotonic()
    try:
        trainer.fit(FailingModel(how.startswith("hook") and rank == 1), loader())
    except Exception as error:  # noqa: BLE001  the test looks at it
        end.update(error=type(error).__name__, message=str(error))
    end.update(step=trainer.global_step, seconds=time.monotonic() - started)
    (directory / f"end-{rank}.json").write_text(json.dumps(end))
    os._exit(1 if end["error"] else 0)  # there may be nobody left to say goodbye to


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
