"""How one save goes: room for it, what to write under which name, and what is said of it when it is there or has failed."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import proxy

from nemologger import lightning_port
from nemologger.checkpoint.commit import taken_over_by
from nemologger.checkpoint.find import survey
from nemologger.checkpoint.keeping.decision import Decision, choose, choose_again
from nemologger.checkpoint.keeping.retention import Kept
from nemologger.checkpoint.keeping.shelf import claim
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.state.snapshot import Snapshot
from nemologger.context.trainer_context import TrainerContext
from nemologger.disk import Disk
from nemologger.errors import ContextError, RankError, SaveFailedError
from nemologger.ranks import decide
from nemologger.saving.kept_checkpoints import KeptCheckpoints, floats, ours
from nemologger.saving.notices import Failures, Notices

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger("nemologger.model_checkpoint")

#: Seconds that a disk has to answer, with ``on_busy="skip"``, before the next save begins.
_ANSWER = 1.0


class SavedCheckpoints(KeptCheckpoints):
    """The part of ModelCheckpoint that saves, now; when that is due, and what a state is made of, is its own."""

    always_save_context: bool
    async_save: bool
    on_busy: Literal["wait", "skip"]
    save_context_on_train_end: bool
    save_optim_on_train_end: bool
    _failures: Failures
    _is_ready: bool  # for saves beside training
    _notices: Notices
    _holds: bool
    _life: int
    _origin: int
    _validated: bool

    def _take(self, trainer: pl.Trainer, *, weights_only: bool) -> Snapshot:
        """The state of this moment. Collective."""
        raise NotImplementedError

    def _changes(self, trainer: pl.Trainer, taken: Snapshot) -> list[str]:
        """Why a fresh start of the program could not load ``taken``; nothing if it could."""
        raise NotImplementedError

    def save_now(self, trainer: pl.Trainer) -> None:
        """See :meth:`KeptCheckpoints.save_now`."""
        try:
            self._finish(trainer, final=False)
        except SaveFailedError:
            log.exception("the save before this one failed")
        if not self._is_saved(trainer):
            self._save(trainer, now=True)

    def _save_once(self, trainer: pl.Trainer) -> None:
        """Save, unless another interval has come to the same step."""
        if not self._is_saved(trainer):
            self._save(trainer)

    def _save(self, trainer: pl.Trainer, *, final: bool = False, now: bool = False) -> None:
        """Save the state of this moment; count it as failed, and go on, if that is not possible (contract C7)."""
        if not self._make_room(trainer, final=final):
            return
        self._count_samples(trainer)
        self._metrics = floats(trainer.callback_metrics)
        again = final and self._is_saved(trainer)
        drop_optimizer = final and not self.save_optim_on_train_end and not (again and self.save_last == "link")
        weights_only = self.save_weights_only or drop_optimizer
        seconds = _ANSWER if self.async_save and self.on_busy == "skip" and not (final or now) else None
        decision = decide(
            self._ranks,
            lambda: self._decide(trainer, again=again, weights_only=weights_only, now=now, seconds=seconds),
        )
        if decision is None:
            return
        # The last state of a run is durable before fit returns.
        beside = self.async_save and not (final or now or is_last_step(trainer))
        try:
            decision = self._claim(decision)
            beside = self._write(trainer, decision, weights_only=weights_only, final=final, beside=beside)
        except SaveFailedError as error:
            self._count_failure(error, final=final or now)
            return
        self._saved_at = lightning_port.position(trainer)
        self._last_checkpoint_saved = decision.path
        if self._holds:
            self._keeper.hold()
        if not beside:
            self._published(trainer)
        if self.monitor is not None and decision.score is None:
            self._miss_metric(trainer, decision.path)

    def _make_room(self, trainer: pl.Trainer, *, final: bool) -> bool:
        """Finish the save that is under way beside training; False if the next one is to be skipped instead."""
        if not self._keeper.busy:
            return True
        if self.on_busy == "skip" and not final and not self._keeper.can_finish_now():
            if trainer.is_global_zero:
                log.warning("step %d is not saved: the save before it is still being written", trainer.global_step)
            return False
        self._finish(trainer, final=final)
        return True

    def _finish(self, trainer: pl.Trainer, *, final: bool) -> None:
        """Wait for the save that is under way beside training. Collective."""
        if not self._keeper.busy:
            return
        try:
            fresh = self._keeper.finish()
        except SaveFailedError as error:
            self._saved_at = (0, 0)  # what was saved last is not there: a final save is due
            self._count_failure(error, final=final)
            return
        self._reflect()
        if fresh:
            self._published(trainer)

    def _poll(self, trainer: pl.Trainer) -> None:
        """Look after the save that is under way beside training, without waiting."""
        try:
            if self._keeper.poll():
                self._reflect()
                self._published(trainer)
        except SaveFailedError as error:
            self._saved_at = (0, 0)
            self._count_failure(error, final=False)

    def _decide(
        self, trainer: pl.Trainer, *, again: bool, weights_only: bool, now: bool, seconds: float | None
    ) -> Decision | None:
        """What to write now; None if nothing is to be kept. Rank 0 only: metrics may differ between ranks.

        Args:
            trainer: At a step boundary.
            again: This step has a checkpoint already, which the final one only complements.
            weights_only: Whether it will lack what a resume needs.
            now: The run stops: something is to be kept of this moment in any case.
            seconds: How long the disk may take to answer; else nothing is kept. None is as long as it takes.
        """
        metrics = floats(trainer.callback_metrics)
        score = metrics.get(self.monitor) if self.monitor is not None else None
        if again:
            return choose_again(self.shelf.kept, self._last_checkpoint_saved, score, save_last=self.save_last)
        if not self._keeper.get_ready(self._ask_disk, seconds):
            said = "step %d is not saved: %s does not answer, or what is surplus there is still being removed"
            log.warning(said, trainer.global_step, self.dirpath)
            return None
        path = self._path(trainer, metrics)
        if self._validated or not lightning_port.has_validation(trainer):
            self._notices.missing_fields(self.filename or "", self.monitor, self._values(trainer, metrics))
        candidate = Kept(
            str(path),
            trainer.global_step,
            time.time(),
            score,
            ranked=True,
            life=self._life,
            origin=self._origin,
            samples=self.consumed_samples,
        )
        # Of a run that has ended without optimizer state, the best of k still are to be resumable.
        rankable = weights_only == self.save_weights_only or not self.save_last
        decision = choose(self._policy, self.shelf.kept, candidate, save_last=self.save_last, rankable=rankable)
        if decision is None and now:
            return choose(self._policy, self.shelf.kept, candidate, save_last=True, rankable=rankable)
        if decision is None and self.newest and not any(one.save_last or one.monitor is None for one in ours(trainer)):
            self._notices.not_kept(trainer.global_step, self.monitor, self.newest)
        return decision

    def _ask_disk(self) -> None:
        """Hold the lock. To open its file gets an answer of a network file system, which remembers what it is asked else."""
        if self._lock is None:
            return
        self._lock.hold()
        if self.on_busy == "skip" and self._disk.can_rename:
            taken_over_by(self._disk.path(str(self.dirpath)))

    def _claim(self, decision: Decision) -> Decision:
        """The decision, under a name that is free. Collective."""
        if self._disk.can_rename:
            return decision
        try:
            return decide(self._ranks, lambda: claim(self._disk, decision))
        except (OSError, RankError) as error:
            raise SaveFailedError(f"checkpoint {decision.path} was not saved: {error}") from error

    def _write(self, trainer: pl.Trainer, decision: Decision, *, weights_only: bool, final: bool, beside: bool) -> bool:
        """Write it, beside training if ``beside`` and possible. Returns whether it was beside."""
        self._saves = True
        try:
            taken = self._take(trainer, weights_only=weights_only)
        finally:
            self._saves = False
        beside = beside and (self._is_ready or self._make_ready(taken))
        name = self._disk.path(decision.path).name
        self._notices.left_out(taken, name)
        if trainer.is_global_zero:
            if trainer.global_step == 0 and (batches := lightning_port.steps_taken(trainer)):
                self._notices.uncounted(batches)
            self._notices.grown(name, lambda: self._changes(trainer, taken))
        manifest = Manifest(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            epochs_done=lightning_port.epochs_done(trainer),
            consumed_samples=self.consumed_samples,
            metrics=floats(trainer.callback_metrics),
            owner=self._owner,
            life=self._life,
            origin=self._origin,
            score=decision.score,
            ranked=decision.ranked,
            last=decision.path == decision.last,
        )
        with_context = self.always_save_context or (final and self.save_context_on_train_end)
        write = self._keeper.start if beside else self._keeper.save
        others = self._needed_by_others(trainer)
        try:
            write(taken, decision, manifest, partial(_write_context, trainer) if with_context else None, others)
        finally:
            self._reflect()
        return beside

    def _make_ready(self, snapshot: Snapshot) -> bool:
        """Make memory and writer for saves beside training. False, and all saves wait, if that fails. Collective."""
        try:
            self._keeper.prepare(snapshot)
        except SaveFailedError as error:
            self.async_save = False
            log.warning("%s. Saves are synchronous.", error)
            return False
        self._is_ready = True
        return True

    def _say_what_is_kept(self, trainer: pl.Trainer) -> None:
        """Whoever has stopped a run with Ctrl-C looks at its last lines: which checkpoint there is to go on from."""
        savers = [one for one in ours(trainer) if not one.save_weights_only]
        # Each callback says goodbye by itself: what is newest is known when the last one does.
        if not trainer.is_global_zero or savers[-1:] != [self]:
            return
        newest = max(savers, key=lambda one: max((kept.order for kept in one.shelf.kept), default=(-1, 0, 0.0))).newest
        if self._disk.can_rename:
            newest = self._newest_there() or newest
        if newest:
            log.warning(
                "stopped%s by Ctrl-C; the newest checkpoint is %s: start again with "
                "AutoResume(resume_if_exists=True) to resume from it, or name it as resume_from_path",
                lightning_port.step_reached(trainer),
                newest,
            )

    def _newest_there(self) -> str:
        """As :attr:`newest`, by a look at the disk: Ctrl-C may come between what is published and what is noted of it."""
        with suppress(OSError):
            found = survey(self._disk.path(str(self.dirpath)))
            there = [
                (one.manifest.order, one.is_last, str(one.path))
                for one in found
                if one.manifest and one.manifest.has_optimizer
            ]
            return max(there)[2] if there else ""
        return ""

    def _is_saved(self, trainer: pl.Trainer) -> bool:
        return self._saved_at == lightning_port.position(trainer)

    def _should_skip_saving_checkpoint(self, trainer: pl.Trainer) -> bool:
        """Whether there is nothing to save now. Lightning compares steps, of which it may count none."""
        is_fitting = trainer.state.fn == "fit" and not trainer.sanity_checking and not lightning_port.is_trial(trainer)
        return not is_fitting or self._is_saved(trainer)

    def _should_save_on_exception(self, trainer: pl.Trainer) -> bool:
        skips = self._should_skip_saving_checkpoint(trainer) or lightning_port.steps_taken(trainer) == 0
        return self.save_on_exception and not skips

    def _published(self, trainer: pl.Trainer) -> None:
        """A checkpoint is there: say so, to the loggers too."""
        self._failures.end()
        if not trainer.is_global_zero:
            return
        newest = max(self.shelf.kept, key=lambda kept: kept.order)  # not by time: clocks are set back
        if self.verbose:
            shown = "" if newest.score is None else f" with {self.monitor}={newest.score:.5g}"
            log.info("step %d: saved %s%s", newest.step, newest.path, shown)
        for logger in trainer.loggers:
            try:
                logger.after_save_checkpoint(proxy(self))
            except Exception:  # the checkpoint is there, and the other ranks go on
                log.exception("%s failed after checkpoint %s was saved", type(logger).__name__, newest.path)

    def _count_failure(self, error: SaveFailedError, *, final: bool) -> None:
        newest = max(self.shelf.kept, key=lambda kept: kept.order, default=None)  # it may be of this very step
        self._failures.add(error, None if newest is None else newest.path, final=final)

    def _miss_metric(self, trainer: pl.Trainer, path: str) -> None:
        if self._validated or (trainer.is_global_zero and not lightning_port.has_validation(trainer)):
            logged = trainer.callback_metrics
            self._notices.missing_metric(str(self.monitor), path, logged, validated=self._validated)


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the save of this step is the last one: ``max_steps`` is reached, or a stop was asked for."""
    # Once Lightning leaves its loop it counts the epoch as over: a run that goes on later would skip the rest.
    reached = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return reached or lightning_port.is_stopping(trainer)


def _write_context(trainer: pl.Trainer, output: Path, disk: Disk) -> None:
    """Write ``context/``; what it cannot hold is no reason to lose the weights."""
    try:
        TrainerContext.from_trainer(trainer).io_dump(output, ["model"], disk=disk, strict=False)
    except ContextError as error:
        log.warning("%s was not written: %s", output, error)
