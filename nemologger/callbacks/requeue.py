"""On Slurm: save, have the job requeued and stop, when its time is nearly over; and go on from there in its next life."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from nemologger import lightning_port
from nemologger.callbacks.preemption import PreemptionCallback
from nemologger.callbacks.stop_at_boundary import StopAtBoundary
from nemologger.checkpoint.find import Found, Status, newest, survey
from nemologger.disk import LocalDisk
from nemologger.disk.there import exists
from nemologger.errors import SaveFailedError
from nemologger.loading.verified_reads import Ask, VerifiedReads
from nemologger.ranks import decide, decide_with_help
from nemologger.run.record import record_of
from nemologger.stores.path import storage_path

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from nemologger.saving.kept_checkpoints import KeptCheckpoints

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds, for Slurm's controller
_FITS = count()  # of this process: a program may train several models one after the other, in each life of its job
_ENDED: set[Path] = set()  # the notes of fits that have ended: the job may be requeued in what comes after


class Requeue(PreemptionCallback):
    """What a ModelCheckpoint adds where Lightning would have the job requeued (``SLURMEnvironment(auto_requeue=True)``).

    Lightning saves wherever the signal finds it, into a file that other runs take for theirs. This one does as
    PreemptionCallback does, and has rank 0 requeue the job once the checkpoint is durable. Where Slurm refuses that,
    training goes on for as long as the job may run. A job that is preempted is requeued as well, when SIGTERM stops it. A
    note says where the same job goes on from: a program that does not look for its checkpoints itself would start from
    scratch. After a fit it stays until the next one begins, or the program ends: a job that is requeued while it tests what
    it has trained is not to train it again.
    """

    _place: Path | None = None
    _note: Path | None = None

    @classmethod
    def attach(
        cls, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: KeptCheckpoints, rank_timeout: timedelta
    ) -> None:
        """Add one to ``trainer``, for use in ``checkpoint.setup``, unless the program deals with the signal itself."""
        sig, callbacks = lightning_port.requeue_signal(trainer), lightning_port.callbacks(trainer)
        if sig is None or any(isinstance(other, PreemptionCallback) and other.sig == sig for other in callbacks):
            return
        added = cls(sig, rank_timeout=rank_timeout)
        added._place = _place(trainer, checkpoint)
        lightning_port.set_callbacks(trainer, [*callbacks, added])
        added.setup(trainer, pl_module, "fit")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Be told of the signal instead of Lightning, and go on from where the job was requeued."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self._ranks is None:
            self._undo.append(lightning_port.on_requeue_signal(trainer, lambda *given: self._requeue_at_once(trainer)))
            return
        _forget_ended()
        if self._place is not None:
            program = hashlib.sha256(repr(sys.argv).encode()).hexdigest()[:8]
            self._note = self._place / f".requeued-{_job()}-{program}-{next(_FITS)}"
        self._undo.append(lightning_port.on_requeue_signal(trainer, self._receive))
        for other in lightning_port.callbacks(trainer):
            # SIGTERM comes next, and may be there at the same boundary: whoever stops first decides whether the job goes on.
            if isinstance(other, StopAtBoundary) and other is not self:
                lightning_port.move_to_end(trainer, other)
        read = VerifiedReads(self._ranks, None)

        def look(ask: Ask) -> str:
            return self._noted(trainer, lambda path: read.faults_only(path, ask))

        noted = decide_with_help(self._ranks, look, read.share, read.progress)
        if noted:
            lightning_port.go_on_from(trainer, noted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what has come of it."""
        checkpoint = self._saving(trainer)
        if self._note is None or checkpoint is None or not trainer.is_global_zero:
            return
        # What was stopped before its end, and is without optimizer state, can neither be gone on with nor be left alone.
        if any(kept.has_optimizer for kept in checkpoint.shelf.kept) or not lightning_port.is_stopping(trainer):
            self._take_note(checkpoint)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Training has ended by itself."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and self._note is not None and trainer.is_global_zero:
            atexit.unregister(_forget_ended)
            atexit.register(_forget_ended)
            _ENDED.add(self._note)

    def _listen(self) -> None:
        """Lightning calls this one."""

    def _warn_of_no_save(self) -> None:
        """Nobody has asked for it."""

    def _leave(self, trainer: pl.Trainer, failed: SaveFailedError | None) -> None:
        self._received = False
        if self._ranks is None:
            return
        refused = decide(self._ranks, lambda: self._requeue_from_here(trainer))
        if not refused:
            super()._leave(trainer, failed)
        elif trainer.is_global_zero:
            log.error("the job was not requeued, and training goes on while it may: %s", refused)

    def before_exit(self, trainer: pl.Trainer, by: PreemptionCallback) -> None:
        """Slurm requeues a preempted job at once, or when the partition's GraceTime is over, if it has not ended by then."""
        if by is self or self._ranks is None:
            return

        def come_back() -> str:
            fate = _fate()
            if fate is Fate.REQUEUED:
                self._take_note(self._saving(trainer))
            return self._requeue_from_here(trainer) if fate is Fate.PREEMPTED else ""

        refused = decide(self._ranks, come_back)
        if refused and trainer.is_global_zero:
            log.error("the job is preempted, and was not requeued: %s", refused)

    def _requeue_from_here(self, trainer: pl.Trainer) -> str:
        self._take_note(self._saving(trainer))
        return self._requeue()

    def _requeue_at_once(self, trainer: pl.Trainer) -> None:
        """Outside of a fit, where there is nothing to save."""
        if not trainer.is_global_zero:
            return
        refused = self._requeue()
        if refused:
            log.error("the job was not requeued: %s", refused)
        else:
            _ENDED.clear()  # the next life finds them

    def _noted(self, trainer: pl.Trainer, faults: Callable[[Path], list[str]]) -> str:
        """The checkpoint that this job goes on from, "" if it was not requeued, or the program says where to."""
        if self._note is None or not exists(self._note) or lightning_port.goes_on_elsewhere(trainer):
            return ""
        options = getattr(self._saving(trainer), "storage_options", None)
        origin, path = os.fsdecode(self._note.read_bytes()).split(" ", 1)
        directory = storage_path(path, options).parent

        def is_ours(one: Found) -> bool:
            # Other fits of the program may write there too, this life's earlier ones included.
            own = one.manifest is None or one.manifest.origin == int(origin)
            return own and one.status is not Status.FOREIGN

        def why_not(one: Found) -> str | None:
            known = one.manifest
            ended = known is not None and known.is_finished(max_steps=trainer.max_steps, max_epochs=trainer.max_epochs)
            return None if known is not None and (known.has_optimizer or ended) else "it has no optimizer state"

        found = newest(filter(is_ours, survey(directory)), faults, log.error, why_not)
        if found is None:
            log.warning("%s says that this run has checkpoints in %s, but there is none of it", self._note, directory)
            return ""
        log.info("this job was requeued, and goes on from %s", found.path)
        return str(found.path)

    def _take_note(self, checkpoint: KeptCheckpoints | None) -> None:
        """Say where the checkpoints are, and of which training."""
        if self._note is None or checkpoint is None or not checkpoint.shelf.kept:
            return
        origin = max(checkpoint.shelf.kept, key=lambda kept: kept.order).origin
        try:
            LocalDisk().write(self._note, [os.fsencode(f"{origin} {checkpoint.newest}")])
        except OSError as error:
            log.warning("only a program that looks for its checkpoints itself goes on from them: %s", error)

    def _requeue(self) -> str:
        """Have Slurm requeue this job; why it does not, or ""."""
        job = _job()
        if not job:
            return "there is no SLURM_JOB_ID"
        command = ["scontrol", "requeue", job]
        try:
            done = _run(command)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode in (0, -signal.SIGTERM):  # the latter: Slurm ends all processes of the job, this one as well
            log.info("job %s is requeued", job)
            return ""
        return f"{shlex.join(command)} ended with {done.returncode}: {done.stdout.strip()}"


def _forget_ended() -> None:
    while _ENDED:
        with suppress(OSError):
            LocalDisk().remove(_ENDED.pop())


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": _PATIENCE}
    try:
        return subprocess.run(command, **given)  # type: ignore[call-overload, no-any-return]
    except OSError:  # it is not there; it may be a function of the shell, as Lightning allows for
        return subprocess.run(shlex.join(command), shell=True, **given)  # type: ignore[call-overload, no-any-return]


class Fate(Enum):
    """Why SIGTERM came."""

    REQUEUED = "the job ends and starts again"
    PREEMPTED = "it does so in a while, unless it has ended by then"
    OTHER = "somebody has cancelled it, its time is over, or Slurm knows nothing of it"


def _fate() -> Fate:
    try:
        known = _run(["scontrol", "show", "job", _job()]).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("Slurm does not say whether this job is preempted, and it is not requeued: %s", error)
        return Fate.OTHER
    restarts = re.search(r"\bRestarts=(\d+)", known)
    if restarts is not None and int(restarts[1]) > int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return Fate.REQUEUED
    is_preempted = "JobState=RUNNING" in known and re.search(r"\bPreemptTime=(?!None)", known) is not None
    return Fate.PREEMPTED if is_preempted else Fate.OTHER


def _job() -> str:
    """The job's number, as ``scontrol`` takes it; it stays the same when the job is requeued."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _place(trainer: pl.Trainer, checkpoint: KeptCheckpoints) -> Path:
    """Where the next life of this job finds the note: a place that it has too."""
    record = record_of(trainer)
    if record is not None:
        place = record.run.log_dir.parent if record.is_for_one_start else record.run.log_dir
    else:
        place = checkpoint.given_directory or Path(trainer.default_root_dir)
    if "://" in str(place):
        place = Path(trainer.default_root_dir)
    return place.absolute()
