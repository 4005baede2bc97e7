"""At which moments of training something is saved: the hooks of Lightning in which it can be due."""

from __future__ import annotations

import logging
import signal
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from nemologger import lightning_port
from nemologger.checkpoint.writing.staging import comes_to_rest
from nemologger.errors import SilentRankError
from nemologger.saving.batches import batch_size
from nemologger.saving.checks import check_final_weights
from nemologger.saving.due import Due
from nemologger.saving.saves import SavedCheckpoints, is_last_step

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger("nemologger.model_checkpoint")

#: Seconds that a rank with an exception waits for the others to stop too.
_PATIENCE = 30.0


class CheckpointsInTime(SavedCheckpoints):
    """The part of ModelCheckpoint that is called while a run trains."""

    rank_timeout: timedelta
    _due: Due
    _due_after_validation: bool
    _is_prepared: bool
    _postponed: bool

    def _look_ahead(self, trainer: pl.Trainer) -> None:
        """Training stops after this batch: find out now whether another one would follow."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples; save if ``every_n_train_steps`` or ``train_time_interval`` say so."""
        self._counted_here += batch_size(batch)
        step_is_due = self._due.at_step(lightning_port.position(trainer))
        self._look_at_stop(trainer)
        if not lightning_port.is_stopping(trainer):  # the module's own hook, called after this, may ask for it
            lightning_port.behind_module(trainer, "on_train_batch_end", partial(self._save_if_stopping, trainer))
        self._poll(trainer)
        if (
            self.async_save
            and not self._is_prepared
            and lightning_port.steps_taken(trainer) > 0
            and not lightning_port.is_trial(trainer)
        ):
            self._prepare(trainer)
        if not (self._postponed or step_is_due or self._due.has_clock or is_last_step(trainer)):
            return
        # In the middle of gradient accumulation the gradients so far would be lost.
        if self._should_skip_saving_checkpoint(trainer) or self._due.is_accumulating(trainer):
            return
        postponed, self._postponed = self._postponed, False
        if postponed or step_is_due or is_last_step(trainer) or self._due.at_this_time(self._ranks):
            self._save_behind_batch(trainer)

    def _look_at_stop(self, trainer: pl.Trainer) -> None:
        self._due.put_off_stop(trainer)
        if lightning_port.is_stopping(trainer):
            self._look_ahead(trainer)

    def _save_if_stopping(self, trainer: pl.Trainer) -> None:
        self._look_at_stop(trainer)
        stops = lightning_port.is_stopping(trainer) and not self._due.is_accumulating(trainer)
        if stops and not self._should_skip_saving_checkpoint(trainer):
            self._save_behind_batch(trainer)

    def _save_behind_batch(self, trainer: pl.Trainer) -> None:
        """Save when this batch has been dealt with by everybody, and after the validation that follows it."""
        follows = lightning_port.has_validation(trainer) and lightning_port.validation_follows(trainer)
        self._due_after_validation = follows
        if not follows:
            # Whoever resumes after the last batch of an epoch begins the next: the hooks that end it belong to this one.
            is_last = lightning_port.epoch_is_trained(trainer)
            hook = "on_train_epoch_end" if is_last else "on_train_batch_end"
            lightning_port.behind_module(trainer, hook, partial(self._save_unless_validated, trainer))

    def _save_unless_validated(self, trainer: pl.Trainer) -> None:
        if not self._due_after_validation:
            self._save_once(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let nobody swap parameters for validation while they are being copied."""
        self._keeper.hold()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Publish what is written: a run that is to be killed soon may not get to the end of its validation."""
        self._poll(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was due before validation, or what ``every_n_epochs`` says."""
        due, self._due_after_validation = self._due_after_validation, False
        self._validated = self._validated or (trainer.state.fn == "fit" and not trainer.sanity_checking)
        if self._should_skip_saving_checkpoint(trainer):
            return
        due = due or (not self._save_on_train_epoch_end and self._due.at_epoch(trainer.current_epoch))
        lightning_port.behind_module(
            trainer, "on_validation_end", partial(self._save_behind_validation, trainer, due=due)
        )

    def _save_behind_validation(self, trainer: pl.Trainer, *, due: bool) -> None:
        self._due.put_off_stop(trainer)
        if not (due or (lightning_port.is_stopping(trainer) and not lightning_port.epoch_is_trained(trainer))):
            return
        if self._due.is_accumulating(trainer):
            self._postponed = True  # to the optimizer's step
            return
        self._save(trainer)
        self._keeper.hold()  # who has swapped parameters for validation is about to swap them back

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what ``every_n_epochs`` says, with ``save_on_train_epoch_end`` or where no validation runs."""
        self._keeper.hold()
        # Due still: asked for its loaders only now, validation had nothing to do.
        due, self._due_after_validation = self._due_after_validation, False
        left_out = lightning_port.validation_is_left_out(trainer)
        if left_out and trainer.is_global_zero and not lightning_port.is_over(trainer):
            self._notices.no_validation(trainer.current_epoch)
        here = self._save_on_train_epoch_end or left_out or not lightning_port.has_validation(trainer)
        due = due or (here and self._due.at_epoch(trainer.current_epoch)) or lightning_port.is_stopping(trainer)
        if not due or self._should_skip_saving_checkpoint(trainer):
            return
        if self._due.is_accumulating(trainer):
            self._postponed = True
        else:
            lightning_port.behind_module(trainer, "on_train_epoch_end", partial(self._save_once, trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final state, if that has not happened yet."""
        if lightning_port.is_trial(trainer) or lightning_port.steps_taken(trainer) == 0:
            return
        self._finish(trainer, final=False)
        is_saved = self._is_saved(trainer)
        if not is_saved:
            check_final_weights(trainer)
        if not is_saved or self._final_differs(trainer):
            self._save(trainer, final=True)

    def _final_differs(self, trainer: pl.Trainer) -> bool:
        """Whether the final checkpoint holds something else than the one that this step already has."""
        with_context = not self.always_save_context and self.save_context_on_train_end
        # A link can only point to the step's checkpoint as it is.
        without_optimizer = not self.save_optim_on_train_end and self.save_last is True
        return bool(self.save_last) and (with_context or without_optimizer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait for what is being written; save, with ``save_on_exception``."""
        lightning_port.forget_behind_module(trainer)
        if isinstance(exception, SIGTERMException) and exception.code is None:
            # Lightning would end with 0, and a scheduler take the run for finished.
            exception.code = 128 + signal.SIGTERM
        try:
            with lightning_port.interruptible():
                self._end_saves(trainer, exception)
        except KeyboardInterrupt:
            log.error("Ctrl-C again: what is being saved is given up")
            self._keeper.give_up()

    def _end_saves(self, trainer: pl.Trainer, exception: BaseException) -> None:
        try:
            # Ctrl-C and SIGTERM reach all ranks; an error may be that another one has died.
            self._keeper.finish_alone(others_are_there=not isinstance(exception, Exception))
            if self._should_save_on_exception(trainer) and self._all_have_stopped(trainer):
                self._save(trainer, now=True)
        except Exception:  # after an error of CUDA, whatever asks the device raises it again
            log.exception("the state at the exception could not be saved")
        self._keeper.close()

    def _all_have_stopped(self, trainer: pl.Trainer) -> bool:
        """Whether the exception is on all ranks: one alone would wait in vain for the others to save with it."""
        patience = min(self.rank_timeout.total_seconds(), _PATIENCE)
        if self._ranks.world_size > 1 and not comes_to_rest(trainer.strategy.root_device, patience):
            log.error("the state at the exception is not saved: the GPU waits for a rank that has stopped")
            return False
        missing = self._ranks.missing_at("exception", patience)
        if missing is None:
            log.error(
                "the state at the exception is not saved: whether all ranks have stopped is not known. Rank 0, or its "
                "launcher (at MASTER_ADDR), does not answer: it has probably died, or its host has gone"
            )
        elif missing:
            log.error(
                "the state at the exception is not saved: %d of %d ranks did not stop", missing, self._ranks.world_size
            )
        return missing == 0

    def _prepare(self, trainer: pl.Trainer) -> None:
        """Make memory and writer for saves beside training, as soon as the optimizer has its state."""
        self._is_prepared = True
        try:
            snapshot = self._take(trainer, weights_only=self.save_weights_only)
        except SilentRankError:
            raise
        except Exception as error:  # noqa: BLE001  of a hook, say; nobody has asked for a checkpoint of this moment
            log.warning(
                "the state after the first step cannot be taken (%s: %s). That is tried again at the first save, and memory "
                "for saves beside training is made then",
                type(error).__name__,
                error,
            )
            return
        self._make_ready(snapshot)
