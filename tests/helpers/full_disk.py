"""Trains on a disk that is full again and again: ``full_disk.py DIRECTORY [--beside]``, ``DIRECTORY`` on a small disk.

In the middle of every other save the disk runs out of space, each time at another place of it. Prints as JSON what was
seen between the saves.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from toy import SAMPLES, ToyData, ToyModel, names, quiet_trainer

from helpers.engine import faults, newest_in
from nemologger import ModelCheckpoint

WIDTH = 70_000
EVERY = 2
#: Which part of a checkpoint there is room for.
ROOMS = (0.0, 0.3, 0.8, 0.999)
STEPS = EVERY * (2 * len(ROOMS) + 1)


class FillUp(pl.Callback):
    """Comes after ModelCheckpoint. Fills the disk up after every other save, and gives back the space after the next."""

    def __init__(self, directory: Path) -> None:
        self.filler = directory / "filler"
        self.checkpoints = directory / "checkpoints"
        self.rooms = list(ROOMS)
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step % EVERY or step == STEPS:
            return
        _settle(trainer)
        was_full = self.filler.exists()
        self.filler.unlink(missing_ok=True)
        newest = newest_in(self.checkpoints)
        self.seen.append(
            {
                "step": step,
                "full": was_full,
                "newest": newest.manifest.step,
                "faults": faults(newest.path),
                "there": names(self.checkpoints),
            }
        )
        if not was_full and self.rooms:
            size = sum(file.stat().st_size for file in newest.path.rglob("*") if file.is_file())
            self._fill_up(room=int(self.rooms.pop(0) * size))

    def _fill_up(self, room: int) -> None:
        """Take all space but about ``room`` bytes. What a file system says is free it does not all give."""
        with self.filler.open("wb") as file:
            size = 0
            for block in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), size, block)
                        size += block
            file.truncate(max(size - room, 0))
            os.fsync(file.fileno())


def _settle(trainer: pl.Trainer) -> None:
    """Let what is being written come to its end."""
    checkpoint: Any = trainer.checkpoint_callback
    end = time.monotonic() + 60
    while checkpoint._keeper.busy and time.monotonic() < end:
        checkpoint._poll(trainer)
        time.sleep(0.01)
    checkpoint._keeper._remover.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--beside", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("nemologger").setLevel(logging.ERROR)
    checkpoint = ModelCheckpoint(
        monitor=None,
        dirpath=options.directory / "checkpoints",
        filename="{step}",
        every_n_train_steps=EVERY,
        save_top_k=1,
        async_save=options.beside,
    )
    fill_up = FillUp(options.directory)
    trainer = quiet_trainer(max_steps=STEPS, limit_val_batches=0, callbacks=[checkpoint])
    trainer.callbacks.append(fill_up)  # behind ModelCheckpoint, where Lightning would not let it be
    # No epoch ends: what is saved then comes behind all callbacks, and FillUp looks before that.
    trainer.fit(ToyModel(width=WIDTH), DataLoader(ToyData(), batch_size=SAMPLES // (STEPS + 2)))
    newest = newest_in(fill_up.checkpoints)
    end = {"step": trainer.global_step, "newest": newest.manifest.step, "faults": faults(newest.path)}
    print(json.dumps({"seen": fill_up.seen, "end": end, "there": names(fill_up.checkpoints)}))


if __name__ == "__main__":
    main()
