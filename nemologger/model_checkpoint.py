"""The callback that decides when to save and what to keep."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemologger import lightning_port
from nemologger.callbacks.compare_steps import CompareSteps
from nemologger.callbacks.exact_resume import ExactResume
from nemologger.callbacks.preemption import AddedPreemption
from nemologger.callbacks.requeue import Requeue
from nemologger.checkpoint.keeping.shelf import Shelf
from nemologger.checkpoint.state.snapshot import Snapshot, take
from nemologger.checkpoint.writing.staging import StagingMode
from nemologger.context.mixin import IOMixin, forget_argument
from nemologger.disk import Disk, LocalDisk
from nemologger.disk.lock import DirectoryLock
from nemologger.loading import checkpoint_io
from nemologger.loading.compare import Beginning
from nemologger.loading.stopped_early import stay_stopped
from nemologger.ranks import Ranks, SingleProcess, connect, decide, together_at_zero
from nemologger.saving.arguments import check_arguments, given_directory, possible_last
from nemologger.saving.checks import (
    check_first_save,
    check_interval,
    check_lengths,
    check_monitor,
    check_ranks,
    check_scratch,
    check_shared,
    check_state,
    check_trainer,
    check_tried_validation,
    check_validation,
)
from nemologger.saving.due import Due
from nemologger.saving.kept_checkpoints import ours
from nemologger.saving.moments import CheckpointsInTime
from nemologger.saving.notices import Failures, Notices
from nemologger.stores.owner import StoreOwner
from nemologger.stores.path import in_store, storage_path
from nemologger.stores.remote_disk import disk_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class ModelCheckpoint(IOMixin, CheckpointsInTime):
    """Saves checkpoints that are complete or absent, keeps the best ones and the last one, and finds them again.

    A checkpoint is a directory ``<filename>/`` with ``weights/`` (written by all ranks), ``context/`` and a manifest. It
    works in ``nemologger.NeMoLogger(ckpt=...)`` and as a plain callback of any Lightning Trainer.

    Args:
        monitor: The metric that says which checkpoints are best; None keeps the newest.
        verbose: Log every save.
        save_last: Also keep what to resume from under ``<filename>-last``: True for a directory that stands by itself
            (sharing its bytes through hard links), ``"link"`` for a symbolic link, also where there are no hard links, False
            for none. Where there are no links at all it is a copy. The final state of a run is saved when training ends, as
            ``-last``; without it only if it is among the best.
        save_top_k: How many of the best to keep; 0 none, -1 all.
        save_weights_only: Leave out optimizers, schedulers and callbacks. A run cannot resume from such a checkpoint.
        mode: ``"min"`` or ``"max"``: which values of ``monitor`` are better.
        every_n_epochs: Save at the end of every n-th epoch's validation. The default, 1, if no other interval is given.
        every_n_train_steps: Save every n optimizer steps. If validation is due at such a step, save after it.
        train_time_interval: Save when so much time has passed since the last save.
        save_on_train_epoch_end: With ``every_n_epochs``, save at the end of training rather than of validation.
        save_optim_on_train_end: False leaves optimizer state out of the ``-last`` of the finished run. Such a run can only
            be continued from an earlier checkpoint.
        save_last_n_optim_states: Keep optimizer and scheduler state only in the newest n checkpoints, to save room; -1, the
            default: in all. An older one is replaced, beside training and once a newer one is published, by one of the same
            name that holds the rest: weights, averages and ``context/``. It can be validated, exported and fine-tuned from,
            but not resumed; who is reading it at that very moment has to try again. ``-last`` is not counted and always has
            its state, as has the newest checkpoint of all, even with 0. With 0 or 1, a damaged newest checkpoint may leave
            nothing to resume from. Model and optimizer are written to files of their own, so that all of this is a matter
            of hard links, whatever the size and the number of ranks; without hard links, or for checkpoints from before
            this was set, rank 0 copies the model's part, and the next save waits for that. Not for object stores.
        always_save_context: Write ``context/`` (the settings of model, data and trainer) into every checkpoint.
        save_context_on_train_end: Write it into the final one.
        async_save: Save beside training: it waits for a copy in memory, which a process per rank writes to disk. Takes as
            much memory again as the state. The final state is always durable before ``fit`` returns. A strategy's
            ``ckpt_async_save=True`` (:mod:`nemologger.strategies`) does the same.
        on_busy: With ``async_save``, when a save is due while the one before is still being written, or while the disk does
            not answer: ``"wait"`` for it, which the log says, or ``"skip"`` the new one.
        staging: With ``async_save``, when the state is copied. ``"at_once"``: training waits for the copy. ``"overlapped"``:
            buffers are copied at once, parameters and optimizer state during the next forward and backward; the optimizer's
            step waits for them. A hook that changes parameters in between, other than through an optimizer, makes that save
            fail; a step that a CUDA graph replays is not seen at all, and needs ``"at_once"``. ``"auto"``: overlapped for
            tensors on CUDA devices, where the device waits before the next forward if the model overrides a hook that runs
            in between; on the CPU at once: whoever writes to parameters in a way that torch does not count, as through
            ``.data``, cannot do so in the middle of the copy. Where nobody does, ``"overlapped"`` loses less there, too.
        dirpath: Where the checkpoints go; default ``<run directory>/checkpoints``. Also a URL that fsspec knows, such as
            ``s3://bucket/key``. On such a store nothing is overwritten or renamed: where a complete checkpoint has the name
            already, the new one is called ``<filename>-v1`` and the other is removed once it is published; ``-last`` is a
            small object that names a checkpoint, or a directory where there is no such checkpoint. There is no lock there
            that keeps a second run out: of two, the one that has begun last goes on saving.
        filename: A name with fields, for example ``"{model_name}--{val_loss:.2f}-{step}-{consumed_samples}"``; fields are
            the logged metrics, ``epoch``, ``step``, ``consumed_samples`` and ``model_name``.
        auto_insert_metric_name: Write ``val_loss=1.23`` rather than ``1.23`` into names.
        save_on_exception: Also save when training raises, Ctrl-C and SIGTERM included; of several ranks, all must have
            stopped within 30 s. The step or hook that was under way may be half done in what is saved: a resumed run trains
            on its batch once more, validates anew if that was interrupted, and does not call again a hook that ends a batch
            or an epoch.
        enable_version_counter: Has no effect: a checkpoint of the same name is replaced, never numbered.
        files_per_rank: At most so many weights files for each rank; at least two with ``save_last_n_optim_states``.
        max_failed_saves: Raise after so many saves in a row have failed; before that, training goes on without them.
        rank_timeout: How long to wait for the other ranks of a save.
        exact_resume: Give the trainer an :class:`~nemologger.callbacks.exact_resume.ExactResume`: a resumed run then sees
            the same batches and draws the same random numbers as one that was never stopped, and one that was killed says
            whether the steps that it trains again repeat. False leaves the training loaders as they are.
        save_on_sigterm: On SIGTERM, which schedulers send before they take a machine away, to any rank: save when the
            optimizer's step that is under way is done, and exit with code 143; see
            :class:`~nemologger.callbacks.PreemptionCallback`, which the trainer is given unless it has one. With False all
            ranks stop there together and publish what is being written, and nothing more is saved. On Slurm, where Lightning
            would save and requeue the job (on SIGUSR1, unless it is told ``SLURMEnvironment(auto_requeue=False)``), this is
            done instead, whatever is set here: save at that boundary, requeue the job, exit with code 138; its next life
            goes on from there. No ``hpc_ckpt_*.ckpt`` is written, nor loaded if not by ``fit(ckpt_path="hpc")``.
        storage_options: For a ``dirpath`` that is a URL: what the fsspec file system takes, such as ``endpoint_url``,
            ``key`` and ``secret``. What is not given comes from the usual environment. They are kept out of ``context/``.
        disk: Where to write; default what ``dirpath`` is on.
        **nemo_1: Arguments of NeMo 1 that have no effect, accepted with a warning.

    Raises:
        ConfigurationError: If arguments cannot work.

    Example:
        >>> checkpoint = ModelCheckpoint(monitor="val_acc", mode="max", every_n_train_steps=100)
        >>> checkpoint.save_top_k
        3
    """

    def __init__(
        self,
        monitor: str | None = "val_loss",
        verbose: bool = True,
        save_last: bool | Literal["link"] | None = True,
        save_top_k: int = 3,
        save_weights_only: bool = False,
        mode: str = "min",
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_train_epoch_end: bool | None = False,
        save_optim_on_train_end: bool = True,
        save_last_n_optim_states: int = -1,
        always_save_context: bool = True,
        save_context_on_train_end: bool = True,
        async_save: bool = False,
        on_busy: Literal["wait", "skip"] = "wait",
        staging: StagingMode = "auto",
        dirpath: str | Path | None = None,
        filename: str | None = None,
        auto_insert_metric_name: bool = True,
        save_on_exception: bool = False,
        enable_version_counter: bool = False,
        files_per_rank: int = 2,
        max_failed_saves: int = 3,
        rank_timeout: timedelta = timedelta(minutes=10),
        exact_resume: bool = True,
        save_on_sigterm: bool = True,
        storage_options: Mapping[str, Any] | None = None,
        disk: Disk | None = None,
        **nemo_1: Any,
    ) -> None:
        given = locals()
        self.storage_options = storage_options
        if storage_options is not None:
            forget_argument(self, "storage_options")  # credentials are nothing for a context
        check_arguments(given, signature(ModelCheckpoint).parameters)
        directory = given_directory(dirpath, storage_options)
        save_last = possible_last(save_last, directory)
        super().__init__(
            dirpath=None if directory is None else str(directory),
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last or None,
            save_top_k=save_top_k if monitor is not None else min(save_top_k, 1),
            save_on_exception=save_on_exception,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=False,
        )
        self.save_top_k = save_top_k  # Lightning keeps at most one without a metric, we keep the newest k
        self.save_optim_on_train_end = save_optim_on_train_end
        self.save_last_n_optim_states = save_last_n_optim_states
        self.always_save_context = always_save_context
        self.save_context_on_train_end = save_context_on_train_end
        self.files_per_rank = files_per_rank
        self.max_failed_saves = max_failed_saves
        self.async_save = async_save
        self.on_busy = on_busy
        self.staging: StagingMode = staging
        self.rank_timeout = rank_timeout
        self.exact_resume = exact_resume
        self.save_on_sigterm = save_on_sigterm
        self.consumed_samples = 0
        self.given_directory = directory
        self._given_disk = disk
        self._disk = disk or (directory is not None and disk_of(directory)) or LocalDisk()
        self._check_disk()
        self._ranks: Ranks = SingleProcess()
        self._lock: DirectoryLock | StoreOwner | None = None  # rank 0 holds it while it trains
        self._beginning: Beginning | None = None
        self._compare = CompareSteps()
        self._holds = False
        self._counted_here = 0
        self._metrics: dict[str, float] = {}
        self._restored_metrics: dict[str, float] = {}
        self._life = self._origin = 0
        self._validated = False
        self._begin_fit()
        # Lightning has settled what is due if nobody says so.
        self._due = Due(self._every_n_train_steps, self._train_time_interval, self._every_n_epochs)
        self._keeper = self._keep(Shelf(), beside=False)

    # --- beginning and end ----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the directory, look at what is in it, and check that the monitored metric can appear."""
        check_trainer(trainer, "ModelCheckpoint")
        # Lightning warns about a directory that is not empty only in stage "fit"; ours is there to be continued.
        super().setup(trainer, pl_module, stage="setup")
        checkpoint_io.install(trainer)
        if not self.save_weights_only:  # else Lightning's file is what the job goes on from
            lightning_port.leave_requeue_files(trainer)
        if stage != "fit" or lightning_port.is_trial(trainer):
            return
        directory = storage_path(str(self.dirpath), self.storage_options).absolute()
        self.dirpath = str(directory)
        self._disk = self._given_disk or disk_of(directory) or LocalDisk()
        self._check_disk()
        checkpoint_io.install(trainer, directory)
        self.async_save = self.async_save or getattr(trainer.strategy, "ckpt_async_save", False)
        self._check_neighbours(trainer)
        check_monitor(trainer, lightning_port.callbacks(trainer), self.monitor)
        check_validation(trainer, self.monitor)
        self._attach_others(trainer, pl_module, directory)
        self._ranks = connect(self.rank_timeout)
        check_ranks(self._ranks, trainer, self)
        # Such hooks may change parameters, and often only log: whoever asks for overlapping gets it all the same.
        self._holds = self.staging == "auto" and bool(lightning_port.hooks_between_steps(pl_module))
        shelf = decide(self._ranks, lambda: self._look(trainer))
        check_shared(self._ranks, self._disk, directory)
        self._keeper = self._keep(shelf, beside=self.async_save, staging=self.staging)
        self._begin_fit()
        if lightning_port.position(trainer) == (0, 0):  # else the trainer that it has served before goes on
            self._forget()
        self._reflect()

    def _attach_others(self, trainer: pl.Trainer, pl_module: pl.LightningModule, directory: Path) -> None:
        """Give the trainer the callbacks that do what this one promises besides checkpoints."""
        if self.exact_resume:
            ExactResume.attach(trainer, pl_module, self.rank_timeout)
            if in_store(directory) is None and ours(trainer)[0] is self:  # one is enough
                self._compare = CompareSteps(directory)
        # The ranks ask each other in every step: not with less patience than training has.
        patience = max(self.rank_timeout, lightning_port.patience(trainer))
        if not self.save_weights_only:
            Requeue.attach(trainer, pl_module, self, patience)
        AddedPreemption.attach(trainer, pl_module, patience)

    def _begin_fit(self) -> None:
        """What is counted, and what is said once, is so within one fit."""
        self._failures = Failures(self.max_failed_saves)
        self._notices = Notices()
        self._is_prepared = self._is_ready = False
        self._due_after_validation = self._postponed = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Optimizers are there now: their state is about to be restored, by name."""
        checkpoint_io.get_ready(trainer)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say before training what would end it at its first save."""
        check_tried_validation(trainer, self.monitor)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, check once more now that the length of an epoch is known, and remove what is surplus."""
        self._due.begin(lightning_port.position(trainer))
        self._validated = False
        if lightning_port.is_trial(trainer):
            return
        lightning_port.restore_metrics(trainer, self._restored_metrics)
        stay_stopped(trainer)
        self._life, self._origin = self.shelf.line_from(trainer.global_step, self.consumed_samples)
        check_scratch(trainer, self.shelf, str(self.dirpath))
        self._keeper.prune(lambda: self._needed_by_others(trainer) | self._paths_of(trainer.ckpt_path))
        self._reflect()
        check_interval(trainer, self.monitor)
        if ours(trainer)[0] is self:
            check_first_save(trainer, [one.why_seldom(trainer) for one in ours(trainer)])
        check_lengths(self._ranks, trainer)
        check_state(trainer)
        self._beginning = Beginning(trainer)
        self._compare.begin(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take what this callback has saved."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._compare.resume()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the step with what it was before, if it is trained again; save if it is time."""
        self._compare.note(trainer, outputs)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final state, if that has not happened yet."""
        super().on_train_end(trainer, pl_module)
        self._compare.finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait for what is being written; save, with ``save_on_exception``."""
        try:
            super().on_exception(trainer, pl_module, exception)
        finally:
            if isinstance(exception, KeyboardInterrupt):
                lightning_port.end_forked(trainer)
                self._say_what_is_kept(trainer)
            self._compare.stop(max((kept.step for kept in self.shelf.kept), default=-1))
            self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the next run have the directory, and give back memory and processes."""
        self._release()

    def _release(self) -> None:
        self._keeper.close()
        self._compare.close()
        self._compare = CompareSteps()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # --- what -----------------------------------------------------------------------------------------------------

    def _take(self, trainer: pl.Trainer, *, weights_only: bool) -> Snapshot:
        """The state of this moment. Hooks of the user are called for it: what one of them raises, all ranks raise."""
        taken: list[Snapshot] = []

        def dump() -> None:
            state = lightning_port.training_state(trainer, weights_only=weights_only)
            names = (state.parameter_names, state.optimizer_names, state.trained_names)
            taken.append(take(state.checkpoint, *names, lightning_port.places_of(trainer)))

        with ExitStack() as stack:
            for exact in [] if weights_only else _exact_resumes(trainer):
                stack.enter_context(exact.gathered())
            together_at_zero(self._ranks, dump)
        return taken[0]

    def _look_ahead(self, trainer: pl.Trainer) -> None:
        for exact in _exact_resumes(trainer):
            exact.look_ahead(trainer)

    def _changes(self, trainer: pl.Trainer, taken: Snapshot) -> list[str]:
        return self._beginning.changes(trainer, taken) if self._beginning is not None else []


def _exact_resumes(trainer: pl.Trainer) -> list[ExactResume]:
    return [callback for callback in lightning_port.callbacks(trainer) if isinstance(callback, ExactResume)]
