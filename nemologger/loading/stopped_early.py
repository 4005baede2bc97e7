"""A run that had decided to end, and is started again: by a scheduler, or by a sweep."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from nemologger import lightning_port

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


def stay_stopped(trainer: pl.Trainer) -> None:
    """Hold to what ``EarlyStopping`` had decided before the checkpoint that ``trainer`` goes on from was saved.

    Lightning restores its counts, and forgets its decision: each start would train on to the next validation, and past
    where the run that was never stopped has ended. As ever, ``min_epochs`` and ``min_steps`` are trained first.

    Args:
        trainer: At ``on_train_start``, everything being restored.
    """
    if not trainer.ckpt_path:
        return
    for callback in lightning_port.callbacks(trainer):
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.warning(
                    "%s had ended this run in epoch %d: %s To train on all the same, take it out of Trainer(callbacks=...).",
                    type(callback).__name__,
                    callback.stopped_epoch,
                    callback.stopping_reason_message or f"{callback.stopping_reason.value}.",
                )
