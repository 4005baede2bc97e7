"""Trains on a disk that is unmounted for one of the saves: ``unmounted.py DIRECTORY``.

What is mounted is a directory of ``DIRECTORY``, where only this process sees it. Prints as JSON what was seen.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch import Callback
from toy import Scored, loader, names, quiet_trainer

from helpers.engine import faults
from nemologger import ModelCheckpoint


class Unmounts(Callback):
    """Behind the first save; it is there again before the third."""

    def __init__(self, disk: Path, at: Path) -> None:
        self.disk, self.at = disk, at
        self.below: list[str] = []

    def mount(self) -> None:
        subprocess.run(["mount", "--bind", self.disk, self.at], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.at], check=True)  # the lock of the directory is open

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        checkpoint = trainer.checkpoint_callback
        while checkpoint.busy:
            checkpoint._poll(trainer)
            time.sleep(0.01)
        if trainer.global_step == 4:
            self.unmount()
        if trainer.global_step == 7:
            self.below = [str(path) for path in self.at.iterdir()]
            self.mount()


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    logging.basicConfig()
    unmounts = Unmounts(directory / "disk", directory / "at")
    for place in (unmounts.disk, unmounts.at):
        place.mkdir()
    unmounts.mount()
    checkpoints = unmounts.at / "run" / "checkpoints"
    ckpt = ModelCheckpoint(dirpath=checkpoints, filename="{step}", every_n_train_steps=2, save_top_k=1, async_save=True)
    trainer = quiet_trainer(max_steps=8, val_check_interval=2, callbacks=[unmounts, ckpt])
    trainer.fit(Scored(scores=[2.0, 2.0, 2.0, 1.0, 3.0, 3.0, 3.0, 3.0]), loader(), loader())
    there = names(checkpoints)
    told = {"there": there, "faults": [fault for name in there for fault in faults(checkpoints / name)]}
    unmounts.unmount()
    told["below"] = unmounts.below + [str(path) for path in unmounts.at.iterdir()]
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
