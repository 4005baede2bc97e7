"""Whether a checkpoint's ``monitor`` can ever be logged under a Trainer's limits. Knows numbers only, no Trainer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

# "val_loss", "val/acc", "loss_valid", "valLoss", "VAL_F1"; not "value_loss", "eval_loss" or "interval".
_VALIDATION = re.compile(r"(?<![A-Za-z])(?:[Vv]al(?:id(?:ation)?)?(?![a-z])|VAL(?:ID(?:ATION)?)?(?![A-Za-z]))")

# So much alike, of 1, two names are when one is most likely a slip of the other.
_LIKE = 0.85

# What Lightning trains for when neither max_epochs nor max_steps is given.
DEFAULT_MAX_EPOCHS = 1000


def is_of_validation(monitor: str | None) -> bool:
    """Whether the name of a metric says that validation logs it.

    Example:
        >>> is_of_validation("val_loss"), is_of_validation("value_loss")
        (True, False)
    """
    return monitor is not None and _VALIDATION.search(monitor) is not None


def is_meant_for_validation(monitor: str | None, logged: Iterable[str]) -> bool:
    """Whether the name of a metric says so, or is nearly that of one that validation has ``logged``.

    Example:
        >>> is_meant_for_validation("vall_loss", ["val_loss"]), is_meant_for_validation("train_loss", ["val_loss"])
        (True, False)
    """
    if monitor is None or is_of_validation(monitor):
        return monitor is not None
    return "train" not in monitor.lower() and bool(get_close_matches(monitor, logged, n=1, cutoff=_LIKE))


def why_it_cannot_appear(
    monitor: str | None,
    *,
    max_epochs: int | None,
    max_steps: int,
    check_val_every_n_epoch: int | None = 1,
    val_check_interval: Any = 1.0,
    limit_val_batches: float = 1.0,
    limit_train_batches: float = 1.0,
    accumulate_grad_batches: int = 1,
) -> str | None:
    """Why no validation that could log ``monitor`` takes place before training ends; None if one may.

    Only what is certain counts: the length of an epoch is not known yet, and a metric whose name does not speak of
    validation is taken to be logged in training.

    Args:
        monitor: Name of the metric.
        max_epochs: The Trainer's; None and -1 as Lightning reads them.
        max_steps: The Trainer's, in optimizer steps; -1 for no limit.
        check_val_every_n_epoch: The Trainer's; None counts batches across epochs.
        val_check_interval: The Trainer's: a number of batches (int), a share of an epoch (float), or a time.
        limit_val_batches: The Trainer's: a number of batches (int) or a share (float).
        limit_train_batches: The same for training.
        accumulate_grad_batches: Batches per optimizer step.

    Example:
        >>> why_it_cannot_appear("val_loss", max_epochs=2, max_steps=-1, check_val_every_n_epoch=5)
        'validation first runs after epoch 5 (check_val_every_n_epoch=5), but max_epochs=2'
        >>> why_it_cannot_appear("val_loss", max_epochs=5, max_steps=-1, check_val_every_n_epoch=5)
    """
    if not is_of_validation(monitor) or 0 in (max_epochs, max_steps, limit_train_batches):
        return None
    if limit_val_batches == 0:
        return "validation never runs (limit_val_batches=0)"
    if max_epochs is None:
        max_epochs = DEFAULT_MAX_EPOCHS if max_steps == -1 else -1
    if check_val_every_n_epoch is not None and -1 < max_epochs < check_val_every_n_epoch:
        return (
            f"validation first runs after epoch {check_val_every_n_epoch} "
            f"(check_val_every_n_epoch={check_val_every_n_epoch}), but max_epochs={max_epochs}"
        )
    if type(val_check_interval) is not int:
        return None
    # At most: the last step of an epoch may take fewer batches.
    if max_steps != -1 and val_check_interval > max_steps * accumulate_grad_batches:
        return (
            f"validation first runs after {val_check_interval} training batches "
            f"(val_check_interval={val_check_interval}), but max_steps={max_steps}"
            + (f" with accumulate_grad_batches={accumulate_grad_batches}" if accumulate_grad_batches > 1 else "")
        )
    if (
        check_val_every_n_epoch is None
        and type(limit_train_batches) is int
        and max_epochs != -1
        and val_check_interval > max_epochs * limit_train_batches
    ):
        return (
            f"validation first runs after {val_check_interval} training batches "
            f"(val_check_interval={val_check_interval}, check_val_every_n_epoch=None), but "
            f"max_epochs={max_epochs} with limit_train_batches={limit_train_batches}"
        )
    return None
