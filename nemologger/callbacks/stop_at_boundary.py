"""Ending a fit between two optimizer steps: all ranks at once, and with everything saved."""

from __future__ import annotations

import logging
from abc import abstractmethod
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port
from nemologger.condition import holds
from nemologger.errors import ConfigurationError, SaveFailedError
from nemologger.ranks import Poll, Ranks, connect
from nemologger.saving.kept_checkpoints import KeptCheckpoints, ours

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class StopAtBoundary(Callback):
    """Saves and stops when one rank wants to; the ranks agree on the moment.

    That is the end of an optimizer step (not of a batch whose gradients are kept for a later one), or of the validation
    that follows it. Training that is over with that step is left to end by itself. Other callbacks, and the module's own
    hooks, have done their part before: this one moves to the end of the trainer's list.

    Args:
        rank_timeout: How long to wait for the other ranks; None for as long as training itself does (the strategy's
            ``timeout``), but at least 10 minutes.

    Raises:
        ConfigurationError: If it is no time.
    """

    def __init__(self, rank_timeout: timedelta | None = None) -> None:
        if rank_timeout is not None and not holds(lambda: rank_timeout > timedelta(0)):
            raise ConfigurationError(
                f"{type(self).__name__}(rank_timeout={rank_timeout!r}): expected a datetime.timedelta, more than no time, "
                "or None"
            )
        self.rank_timeout = rank_timeout
        self._ranks: Ranks | None = None
        self._poll: Poll | None = None
        self._position = (0, 0)
        self._at_boundary = False
        self._after_validation = False

    @property
    @abstractmethod
    def _reason(self) -> str | None:
        """Why this rank wants to stop, or None."""

    @abstractmethod
    def _leave(self, trainer: pl.Trainer, failed: SaveFailedError | None) -> None:
        """Stop, now that everything is saved, unless that ``failed``; to return is to go on. Collective."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the last place among the callbacks, and see who saves."""
        if stage != "fit":
            return
        lightning_port.move_to_end(trainer, self)
        given = self.rank_timeout
        self._ranks = lightning_port.connect_as_patiently(trainer) if given is None else connect(given)
        self._poll = Poll(self._ranks)
        self._at_boundary = self._after_validation = False
        if trainer.is_global_zero and self._saving(trainer) is None and not lightning_port.is_trial(trainer):
            self._warn_of_no_save()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Steps count from here."""
        self._position = lightning_port.position(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: stop, or do so after the validation that follows."""
        # With manual optimization only the count of steps says whether one was taken.
        position = lightning_port.position(trainer)
        has_stepped = lightning_port.passes(1, self._position, position)
        self._at_boundary = has_stepped and not lightning_port.is_accumulating(trainer)
        if self._poll is None or not self._at_boundary:
            return
        self._position = position
        if not self._poll(self._reason is not None) or lightning_port.is_over(trainer):
            return
        if lightning_port.has_validation(trainer) and lightning_port.validation_follows(trainer):
            self._after_validation = True  # a run that is resumed in front of it would leave it out
            self._say(trainer, ", after the validation that is due now")
        else:
            is_last = lightning_port.epoch_is_trained(trainer)  # the hooks that end an epoch belong to it
            hook = "on_train_epoch_end" if is_last else "on_train_batch_end"
            lightning_port.behind_module(trainer, hook, partial(self._stop, trainer, log_batch=not is_last))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop, if that was due before validation or came up during it."""
        if self._poll is None or not self._at_boundary or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        due, self._after_validation = self._after_validation, False
        if (due or self._poll(self._reason is not None, now=True)) and not lightning_port.is_over(trainer):
            lightning_port.behind_module(trainer, "on_validation_end", partial(self._stop, trainer))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The run ends already."""
        lightning_port.forget_behind_module(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Another fit makes its own agreement."""
        self._ranks = self._poll = None

    def _say(self, trainer: pl.Trainer, when: str = "") -> None:
        log.warning(
            "%s: this run %s at step %d%s",
            self._reason or "another rank asked",
            "stops" if self._saving(trainer) is None else "saves and stops",
            trainer.global_step,
            when,
        )

    def _stop(self, trainer: pl.Trainer, *, log_batch: bool = False) -> None:
        self._say(trainer)
        failed: SaveFailedError | None = None
        checkpoint = self._saving(trainer)
        if checkpoint is not None and not lightning_port.is_trial(trainer):
            try:
                checkpoint.save_now(trainer)
            except SaveFailedError as error:
                failed = error
        if log_batch:  # the next run goes on behind it
            lightning_port.log_batch(trainer)
        self._leave(trainer, failed)

    def _saving(self, trainer: pl.Trainer) -> KeptCheckpoints | None:
        """Whose checkpoints the run goes on from."""
        return next((checkpoint for checkpoint in ours(trainer) if self._saves_with(checkpoint)), None)

    def _saves_with(self, checkpoint: KeptCheckpoints) -> bool:
        return not checkpoint.save_weights_only

    def _warn_of_no_save(self) -> None:
        log.warning(
            "%s can stop this run but not save it: the trainer has no nemologger.ModelCheckpoint that saves all that a run "
            "needs to go on. Add one to its callbacks.",
            type(self).__name__,
        )
