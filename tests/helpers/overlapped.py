"""For ``torchrun``: what is copied beside training, of a model spread in the way ``KIND``, against what is copied at once.

``overlapped.py DIRECTORY KIND...``; the checkpoints go to ``DIRECTORY/KIND/at_once`` and ``DIRECTORY/KIND/overlapped``.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from toy import loader

from helpers.sharded import Model, ShardsItself, strategy_of
from nemologger import ModelCheckpoint
from nemologger.checkpoint.writing import staging
from nemologger.checkpoint.writing.staging import Staging


def late(self: Staging, copies: list, copy=Staging._copy) -> None:
    """Who does not wait for the copies is found out."""
    time.sleep(0.05)
    copy(self, copies)


def main(directory: Path, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    staging._SMALL = 0  # nothing but buffers is copied at once
    Staging._copy = late
    for kind in kinds:
        for mode in ("at_once", "overlapped"):
            checkpoint = ModelCheckpoint(
                monitor=None, dirpath=directory / kind / mode, filename="{step}", every_n_train_steps=1, save_top_k=-1,
                save_last=False, always_save_context=False, save_context_on_train_end=False, async_save=True, staging=mode,
                max_failed_saves=1,
            )  # fmt: skip
            trainer = pl.Trainer(
                max_steps=3, devices=int(os.environ["WORLD_SIZE"]), accelerator="cpu", strategy=strategy_of(kind, 2),
                logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[checkpoint],
            )  # fmt: skip
            torch.manual_seed(0)
            trainer.fit((ShardsItself if kind == "lightning" else Model)(), loader())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
