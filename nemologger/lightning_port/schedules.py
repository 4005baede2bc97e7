"""Learning-rate schedules that wait for a metric: Lightning steps them after checkpoints are saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from nemologger.lightning_port.hooks import callbacks, is_behind_epoch
from nemologger.lightning_port.progress import has_only_hooks_of_epoch_left

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(frozen=True)
class PlateauSteps:
    """Schedules that wait for a metric (``ReduceLROnPlateau``): Lightning steps them after checkpoints are saved.

    Attributes:
        metrics: The metrics of then, some of which they wait for.
        due: The numbers of those that are yet to be stepped for the batch or epoch of the checkpoint.
    """

    metrics: dict[str, float]
    due: list[int]


def plateau_steps(trainer: pl.Trainer) -> PlateauSteps:
    """What a checkpoint of this moment leaves undone, and Lightning would not do when it resumes."""
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    epochs: Any = fit_loop.epoch_progress.current
    ends = {
        "step": batches.completed < batches.processed and not loop._should_accumulate(),
        # Saved after the last validation of an epoch, it will be ended by the resumed run.
        "epoch": loop._num_ready_batches_reached()
        and (batches.completed < batches.processed or epochs.completed < epochs.processed)
        and not is_behind_epoch(trainer),
    }
    number = {"step": loop.batch_idx + 1, "epoch": trainer.current_epoch + 1}
    known = {name: value for name, value in trainer.callback_metrics.items() if torch.as_tensor(value).numel() == 1}
    metrics, due = {name: float(value) for name, value in known.items()}, []
    for i, config in enumerate(trainer.lr_scheduler_configs):
        value = trainer.callback_metrics.get(config.monitor or "") if config.reduce_on_plateau else None
        if value is not None and ends[config.interval] and number[config.interval] % config.frequency == 0:
            due.append(i)
    return PlateauSteps(metrics, due)


def step_plateau(trainer: pl.Trainer, steps: PlateauSteps) -> None:
    """Do what :func:`plateau_steps` said, with the metrics of then."""
    metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in steps.metrics.items()}
    trainer._logger_connector._callback_metrics.update(metrics)
    for i in steps.due:
        config = trainer.lr_scheduler_configs[i]
        if config.interval == "epoch" and has_only_hooks_of_epoch_left(trainer):
            continue  # that is the last of them
        trainer.lightning_module.lr_scheduler_step(config.scheduler, metrics[str(config.monitor)])


def step_plateau_at_epoch_end(trainer: pl.Trainer) -> None:
    """For ``on_train_epoch_end``: step what Lightning leaves out in the epoch that it was resumed in."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.fit_loop.restarting and loop._num_ready_batches_reached():
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def averages_were_taken(trainer: pl.Trainer) -> bool:
    """Whether StochasticWeightAveraging goes on in the checkpoint: it has put its schedule in the place of the program's."""
    ours = (callback for callback in callbacks(trainer) if isinstance(callback, StochasticWeightAveraging))
    return any(callback._scheduler_state is not None for callback in ours)


def go_on_averaging(trainer: pl.Trainer) -> None:
    """For ``on_train_start``: let Lightning's StochasticWeightAveraging have its schedule in the middle of an epoch, too.

    It makes it when an epoch starts. The rates that are there stay: they are those of the schedule already.
    """
    for callback in callbacks(trainer):
        if not isinstance(callback, StochasticWeightAveraging) or callback._scheduler_state is None:
            continue
        if not callback._initialized and callback.swa_start <= trainer.current_epoch <= callback.swa_end:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            rates = [group["lr"] for group in groups]
            callback.on_train_epoch_start(trainer, trainer.lightning_module)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
