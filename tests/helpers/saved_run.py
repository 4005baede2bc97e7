"""One life of a run that saves, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from toy import ToyModel, loader, quiet_trainer

from nemologger import ModelCheckpoint


def run(
    directory: Path,
    steps: int,
    model: ToyModel | None = None,
    resume: str | None = None,
    trainer: dict[str, Any] | None = None,
    others: Sequence[pl.Callback] = (),
    **options: Any,
) -> tuple[ModelCheckpoint, ToyModel]:
    """One life of a run that saves into ``directory`` every five steps."""
    settings: dict[str, Any] = {"dirpath": directory, "filename": "{step}", "every_n_train_steps": 5, **options}
    checkpoint = ModelCheckpoint(**settings)
    model = model or ToyModel()
    trainer = quiet_trainer(max_steps=steps, callbacks=[*others, checkpoint], **(trainer or {}))
    trainer.fit(model, loader(), loader(), ckpt_path=resume)
    return checkpoint, model


class StoppedError(Exception):
    """Training ended on purpose."""


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step >= self.step:
            raise StoppedError
