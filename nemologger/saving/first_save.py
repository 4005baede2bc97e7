"""Whether a checkpoint is due before training ends. Knows numbers only, no Trainer."""

from __future__ import annotations

from math import ceil, inf, lcm


def why_seldom_saved(
    *,
    every_n_train_steps: int = 0,
    every_n_epochs: int = 0,
    max_epochs: int | None,
    max_steps: int,
    epoch: float,
    validates: bool = False,
    check_val_every_n_epoch: int | None = 1,
    val_check_batch: float = inf,
    accumulate_grad_batches: int = 1,
) -> str | None:
    """Why nothing is saved before training ends, or less often than the settings say; None if it is.

    A save that is due at the very end is one. Only what is certain counts.

    Args:
        every_n_train_steps: The ModelCheckpoint's; 0 is never.
        every_n_epochs: The same.
        max_epochs: The Trainer's; None and -1 for no limit.
        max_steps: The Trainer's, in optimizer steps; -1 for no limit.
        epoch: Its batches; infinite if their number is not known.
        validates: Whether ``every_n_epochs`` saves when a validation ends.
        check_val_every_n_epoch: The Trainer's; None counts batches across epochs.
        val_check_batch: Validation follows every so many batches.
        accumulate_grad_batches: Batches per optimizer step.

    Example:
        >>> settings = {"every_n_epochs": 1, "max_epochs": -1, "max_steps": 30}
        >>> why_seldom_saved(**settings, epoch=30) is None
        True
        >>> why_seldom_saved(**settings, epoch=31)
        'every_n_epochs=1 is due after 31 steps at the earliest, and training ends after 30'
    """
    of_epoch = _steps(epoch, accumulate_grad_batches)
    last = _times(inf if max_epochs in (None, -1) else max_epochs or 0, of_epoch)
    last = last if max_steps == -1 else min(last, max_steps)
    if last == 0 or not (every_n_train_steps or every_n_epochs) or 0 < every_n_train_steps <= last:
        return None
    if not every_n_epochs:
        return f"every_n_train_steps={every_n_train_steps}, and training ends after {last} steps"
    every, within = every_n_epochs, of_epoch
    if validates:
        every = lcm(every, check_val_every_n_epoch or 1)
        within = _steps(val_check_batch, accumulate_grad_batches)
    before = _times(every - 1, of_epoch)
    first = max(before, within) if validates and check_val_every_n_epoch is None else before + min(of_epoch, within)
    if first == inf and max_epochs not in (None, -1):
        return None  # epochs do end, or they would not be asked for
    if first == inf:
        return f"every_n_epochs={every_n_epochs}, and no epoch ends before the data do, whose length is not known"
    if first > last:
        return f"every_n_epochs={every_n_epochs} is due after {first} steps at the earliest, and training ends after {last}"
    if every > max(every_n_epochs, check_val_every_n_epoch or 1):
        return (
            f"every_n_epochs={every_n_epochs} saves after validation, and with check_val_every_n_epoch="
            f"{check_val_every_n_epoch} only every {every}th epoch has both"
        )
    return None


def _steps(batches: float, of_step: int) -> float:
    return batches if batches == inf else ceil(batches / of_step)


def _times(epochs: float, steps: float) -> float:
    return epochs * steps if epochs and steps else 0
