"""When a checkpoint is due: what ``every_n_train_steps``, ``train_time_interval`` and ``every_n_epochs`` say."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from nemologger import lightning_port
from nemologger.ranks import Ranks

if TYPE_CHECKING:
    import lightning.pytorch as pl


class Due:
    """Counts steps and seconds of one run.

    Args:
        every_n_train_steps: Of the optimizers; 0 is never.
        train_time_interval: None is never.
        every_n_epochs: 0 is never.
    """

    def __init__(self, every_n_train_steps: int, train_time_interval: timedelta | None, every_n_epochs: int) -> None:
        self._steps = every_n_train_steps
        self._interval = train_time_interval
        self._epochs = every_n_epochs
        self.begin((0, 0))

    def begin(self, position: tuple[int, int]) -> None:
        """Training goes on from there (:func:`nemologger.lightning_port.position`), now."""
        self._asked = time.monotonic()
        self._before, self._has_stepped = position, True
        self._stop_is_due = False

    @property
    def has_clock(self) -> bool:
        """Whether it may be due at any time."""
        return self._interval is not None

    def at_step(self, position: tuple[int, int]) -> bool:
        """Whether the batch that is ending has come to a multiple of ``every_n_train_steps``, or passed one.

        With several optimizers a batch takes several steps, and another number of them if one is left out.

        Args:
            position: Where training is now; to be told after every batch.
        """
        before, self._before = self._before, position
        self._has_stepped = lightning_port.passes(1, before, position)
        return self._steps >= 1 and lightning_port.passes(self._steps, before, position)

    def at_this_time(self, ranks: Ranks) -> bool:
        """Whether ``train_time_interval`` has passed since it last had. Collective: clocks differ."""
        if self._interval is None:
            return False
        due = ranks.broadcast(time.monotonic() - self._asked >= self._interval.total_seconds())
        if due:
            self._asked = time.monotonic()
        return due

    def at_epoch(self, epoch: int) -> bool:
        """Whether the epoch that is ending, the first one being 0, is one of ``every_n_epochs``."""
        return self._epochs >= 1 and (epoch + 1) % self._epochs == 0

    def is_accumulating(self, trainer: pl.Trainer) -> bool:
        """Whether gradients are there that a later step is to take, and that a checkpoint would lose.

        With manual optimization that may be so after every batch without a step. A stop does not wait for one.
        """
        by_hand = not trainer.lightning_module.automatic_optimization and not lightning_port.is_stopping(trainer)
        return lightning_port.is_accumulating(trainer) or (by_hand and not self._has_stepped)

    def put_off_stop(self, trainer: pl.Trainer) -> None:
        """While gradients are accumulated, let ``trainer.should_stop`` wait for the step that takes them.

        With manual optimization nobody knows whether there will be one: steps of plain optimizers are not counted.
        """
        trainer.should_stop, self._stop_is_due = trainer.should_stop or self._stop_is_due, False
        if lightning_port.is_stopping(trainer) and lightning_port.is_accumulating(trainer):
            trainer.should_stop, self._stop_is_due = False, True
