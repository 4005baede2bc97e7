"""Where the fit loop is, whether it goes on, and how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.utilities.exceptions import _TunerExitException

if TYPE_CHECKING:
    import lightning.pytorch as pl


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which saves nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a connector


def has_validation(trainer: pl.Trainer) -> bool:
    """Whether the running fit has a validation step, data for it, and leave to use it.

    A ``val_dataloader()`` may return ``[]``, or one without batches: that is known when it has been asked, and Lightning
    calls no hook of validation then.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    return trainer.enable_validation and (loop._combined_loader is None or not loop.skip)


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether validation runs right after the training batch that is ending."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def validates_for_stop(trainer: pl.Trainer) -> bool:
    """As :func:`validation_follows`: because training stops, and for no other reason."""
    if not is_stopping(trainer) or not validation_follows(trainer):
        return False
    trainer.should_stop = False
    try:
        return not validation_follows(trainer)
    finally:
        trainer.should_stop = True


def validation_is_left_out(trainer: pl.Trainer) -> bool:
    """For ``on_train_epoch_end``: whether the epoch was to have a validation, and has ended before it.

    Data may have fewer batches than ``val_check_interval``, or than their ``__len__()`` says, and hooks may end an epoch.
    """
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if every is None or trainer.check_val_every_n_epoch is None or not has_validation(trainer):
        return False
    progress = loop.batch_progress
    ended_before = progress.current.ready < every if every < float("inf") else not progress.is_last_batch
    return loop._should_check_val_epoch() and ended_before


def is_within_step(trainer: pl.Trainer) -> bool:
    """Whether a step is under way, or an exception has ended one."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.started > progress.processed)


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients of the batch that is ending are kept for a later optimizer step."""
    return trainer.lightning_module.automatic_optimization and trainer.fit_loop.epoch_loop._should_accumulate()


def position(trainer: pl.Trainer) -> tuple[int, int]:
    """How many steps optimizers have taken; with manual optimization, also how many batches have been trained on.

    Lightning then counts steps of ``self.optimizers()`` only. A program that has optimizers of its own, takes them with
    ``use_pl_optimizer=False``, or has none, stays at step 0 for ever.
    """
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return trainer.global_step, 0 if trainer.lightning_module.automatic_optimization else int(total.processed)


def position_in(checkpoint: dict[str, Any], module: pl.LightningModule) -> tuple[int, int]:
    """As :func:`position`, of the run that has saved ``checkpoint``."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    batches = 0 if module.automatic_optimization else int(progress.get("total", {}).get("processed", 0))
    return int(checkpoint.get("global_step", 0)), batches


def steps_taken(trainer: pl.Trainer) -> int:
    """``trainer.global_step``; with manual optimization, the batches while Lightning has counted no step."""
    steps, batches = position(trainer)
    return steps or batches


def passes(every: int, before: tuple[int, int], now: tuple[int, int]) -> bool:
    """Whether :func:`steps_taken` has come to a multiple of ``every``, or passed one, from one :func:`position` to the next.

    The first step that is counted is the first one, however many batches have been before.
    """
    unit = 0 if now[0] else 1
    return now[unit] // every > before[unit] // every


def epochs_done(trainer: pl.Trainer) -> int:
    """How many epochs have been trained to their last batch."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return int(progress.processed) + int(is_last_batch and progress.processed < progress.started)


def is_over(trainer: pl.Trainer) -> bool:
    """For ``on_train_batch_end`` and ``on_validation_end``: whether training ends with this batch by itself.

    For ``on_train_start``: whether nothing is left to train.
    """
    max_epochs = trainer.fit_loop.max_epochs
    by_epochs = max_epochs not in (None, -1) and epochs_done(trainer) >= max_epochs
    by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return by_epochs or by_steps or is_stopping(trainer)


def is_stopping(trainer: pl.Trainer) -> bool:
    """As :func:`is_over`: because somebody has set ``trainer.should_stop``."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def leave_fit() -> NoReturn:
    """For a hook: end ``fit``, which returns as usual, without the hooks that say that training has ended."""
    raise _TunerExitException


def goes_on_within_epoch(trainer: pl.Trainer) -> bool:
    """For ``on_train_start``: whether the fit loop goes on where it was stopped, rather than with another epoch."""
    return bool(trainer.fit_loop.restarting)


def epoch_is_trained(trainer: pl.Trainer) -> bool:
    """Whether the last batch of the epoch has been trained on."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached() and not has_begun_batch(trainer)


def has_begun_batch(trainer: pl.Trainer) -> bool:
    """Whether a batch has been taken and not been trained on, or an exception has ended that."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.ready > progress.processed)


def count_left_out(trainer: pl.Trainer, *, epoch_ends: bool) -> None:
    """Count a batch that was not trained on like the others: one that is None, or at which a hook has ended the epoch.

    Lightning does not count it as started. By its sums it then takes every later checkpoint for one from the middle of a
    batch, and trains once more on a batch of that number.

    Args:
        trainer: At the end of a batch or an epoch.
        epoch_ends: At that of an epoch: ``on_train_batch_start`` may have ended it by returning -1.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    for counted in (progress.total, progress.current):
        counted.started = max(counted.started, counted.processed)
        if epoch_ends:
            counted.completed = max(counted.completed, counted.processed)


def forget_begun_batch(trainer: pl.Trainer) -> None:
    """For ``on_train_start``: do not count the batch that was under way when an exception ended the run, and comes again.

    Lightning keeps it in the count over all epochs: with ``check_val_every_n_epoch=None`` it would validate one batch too
    early from then on. It may have been the last of the epoch, which then is not over.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    begun = progress.current.ready - progress.current.processed
    if trainer.fit_loop.restarting and begun > 0:
        for counted in (progress.total, progress.current):
            counted.ready -= begun
            counted.started = min(counted.started, counted.ready)
        progress.is_last_batch = False


def close_trained_epoch(trainer: pl.Trainer) -> None:
    """For ``on_train_start``: let a run that was saved at the end of an epoch begin the next at batch 0.

    Lightning does so where it knows the number of batches in advance, and not if there is a limit of steps: saved in
    ``on_train_epoch_end``, it would count the epoch once more, and train one less.
    """
    fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if fit_loop.restarted_on_epoch_start:
        # A hook that begins an epoch has raised: Lightning would take the epoch before for this one, trained already.
        fit_loop.epoch_progress.total.ready -= 1
        fit_loop.reset_restart_stage()
    unknown = trainer.num_training_batches == float("inf")
    if unknown and loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
        loop.batch_progress.increment_completed()
        _begin_epoch_anew(loop)
        loop.reset_restart_stage()
    elif fit_loop.restarting and not _has_open_epoch(fit_loop) and loop._num_ready_batches_reached():
        # Saved when training had ended with an epoch: with a limit of steps Lightning would take the next one for trained.
        _begin_epoch_anew(loop)
        loop.reset_restart_stage()
        loop.restarting = False  # else it counts one step more, and begins with the end of the validation that has been
    elif fit_loop.restarted_on_epoch_end:
        fit_loop.epoch_progress.increment_completed()
        _begin_epoch_anew(loop)
        fit_loop.reset_restart_stage()
        if validation_follows(trainer):
            # It was before the checkpoint. Lightning would leave it out, and do once more what comes after it: schedules
            # that wait for a metric would take two steps.
            loop.restarting = False
    elif loop.restarted_on_last and loop._num_ready_batches_reached() and not validation_follows(trainer):
        # Saved after a validation that there was because training stopped. Lightning would train on one batch more.
        loop.val_loop._has_run = True
        loop._batches_that_stepped += 1


def close_last_batch(checkpoint: dict[str, Any], *, validates: bool) -> None:
    """Let a run that a hook has ended behind a training step go on with what follows that batch.

    Lightning would leave it out: the validation, all that ends an epoch, and the hooks that begin the next one.

    Args:
        checkpoint: Saved then.
        validates: Whether a validation was to follow the batch. Then :func:`validate_first` belongs to it.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is not None and (validates or progress["is_last_batch"]):
        for counted in (progress["total"], progress["current"]):
            counted["completed"] = counted["processed"]


def has_more_epochs(checkpoint: dict[str, Any], max_epochs: int | None) -> bool:
    """Whether ``checkpoint`` has more than the run may train: Lightning raises then, and does not with as many."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
    return progress is not None and max_epochs is not None and progress["current"]["processed"] > max_epochs > -1


def count_no_more_epochs(checkpoint: dict[str, Any], max_epochs: int | None) -> None:
    """For a run that has nothing left to train, and :func:`has_more_epochs`: let it end without an error."""
    if max_epochs is None:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    progress["current"] = {key: min(value, max_epochs) for key, value in progress["current"].items()}


def validate_first(trainer: pl.Trainer) -> None:
    """For ``on_train_start``: have the validation that was due when a hook raised, all of it."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    val_loop.batch_progress.reset()
    val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION


def has_only_hooks_of_epoch_left(trainer: pl.Trainer) -> bool:
    """Whether the run goes on with the end of an epoch, of which all batches and validations have been."""
    loop = trainer.fit_loop.epoch_loop
    return loop.restarting and loop._num_ready_batches_reached() and loop.val_loop._has_run


def begin_next_epoch_anew(trainer: pl.Trainer) -> None:
    """For ``on_train_epoch_end``: after an epoch without a batch Lightning would go on within the next one."""
    trainer.fit_loop.epoch_loop.restarting = False


def _has_open_epoch(fit_loop: Any) -> bool:
    return bool(fit_loop.epoch_progress.total.completed < fit_loop.epoch_progress.total.ready)


def _begin_epoch_anew(loop: Any) -> None:
    loop.batch_progress.reset_on_run()
    loop.scheduler_progress.reset_on_run()
    loop.automatic_optimization.optim_progress.reset_on_run()
    loop.val_loop.batch_progress.total.reset()


def drop_interrupted_validation(trainer: pl.Trainer) -> None:
    """For ``on_train_start``: do not go on with a validation that the checkpoint was saved in the middle of."""
    trainer.fit_loop.epoch_loop.val_loop.reset_restart_stage()


def modes_of_training(trainer: pl.Trainer) -> dict[str, bool]:
    """During a validation: which parts of the module were in training mode before it, by name."""
    return dict(trainer.fit_loop.epoch_loop.val_loop._module_mode.mode) if trainer.validating else {}
