"""What reaches the loggers, and under which step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nemologger.lightning_port.progress import is_accumulating

if TYPE_CHECKING:
    import lightning.pytorch as pl


def logs_this_batch(trainer: pl.Trainer) -> bool:
    """Whether what is logged in this batch reaches the loggers (``log_every_n_steps``)."""
    return trainer._logger_connector.should_update_logs


def log_is_due(trainer: pl.Trainer, every: int) -> bool:
    """For ``on_train_batch_end``: whether the batch ends a step that is to be logged, every ``every`` steps."""
    return not is_accumulating(trainer) and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def logged_step(trainer: pl.Trainer) -> int:
    """The step that Lightning logs the training batch of this moment under."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def next_logged_step(trainer: pl.Trainer) -> int:
    """The step that a resumed run logs its next batch under, if it is to go on as the uninterrupted one would have.

    For ``on_train_start``. Lightning counts a step after what is logged and saved in it, but for the end of an epoch.
    """
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    batches: Any = loop.batch_progress.total
    epochs: Any = fit_loop.epoch_progress.current
    within_batch = batches.completed < batches.processed or epochs.processed < epochs.ready
    return loop._batches_that_stepped + (within_batch and not loop._should_accumulate())


def set_next_logged_step(trainer: pl.Trainer, step: int) -> None:
    """Log the batch that is starting under ``step``."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def log_batch(trainer: pl.Trainer) -> None:
    """For who ends training behind ``on_train_batch_end``: log the batch, which Lightning would do next."""
    connector = trainer._logger_connector
    type(connector).on_batch_end(connector)  # that of the object may be the very call that this is made from
    connector.update_train_step_metrics()


def show_metrics(trainer: pl.Trainer, metrics: dict[str, float], *, prog_bar: bool) -> None:
    """Put ``metrics`` where callbacks and the progress bar find them, without loggers.

    A metric that is logged costs time in every step after that, because Lightning goes through all of them.
    """
    connector = trainer._logger_connector
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    connector._callback_metrics.update(values)
    if prog_bar:
        connector._progress_bar_metrics.update(metrics)


def restore_metrics(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Let ``trainer.callback_metrics`` be what they were when a checkpoint was saved.

    A resumed run may end the epoch before it validates again, and early stopping asks for its metric then.
    """
    known = trainer._logger_connector._callback_metrics
    for name, value in metrics.items():
        exactly = torch.tensor(value, dtype=torch.float64)
        single = exactly.float()
        # With precision="64-true" metrics have more digits than a tensor of a number has by itself.
        # Those of a learning rate finder, say, are there already.
        known[name] = exactly if single.double() != exactly and not exactly.isnan() else single
