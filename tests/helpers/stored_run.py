"""A run whose checkpoints are in a store."""

from __future__ import annotations

import lightning.pytorch as pl
from toy import ToyModel, loader, quiet_trainer

import nemologger as nl
from nemologger.stores.path import storage_path


def life(url, steps, *, others=(), model=None, resume=True, options=None, trainer=None, **settings):
    """One life of a run that saves every five steps."""
    settings = {"dirpath": url, "filename": "{step}", "every_n_train_steps": 5, "save_top_k": 2, **settings}
    checkpoint = nl.ModelCheckpoint(**settings, storage_options=options)
    trainer = quiet_trainer(max_steps=steps, callbacks=[*others, checkpoint], **(trainer or {}))
    if resume:
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
    model = model or ToyModel()
    trainer.fit(model, loader(), loader())
    return checkpoint, model


def names_in(url):
    return [path.name for path in storage_path(url).iterdir()]


class At(pl.Callback):
    """Does something when a step begins."""

    def __init__(self, what) -> None:
        self.what = what

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step in self.what:
            self.what.pop(trainer.global_step)()
