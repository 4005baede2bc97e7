"""Where a run writes, and what it writes there besides checkpoints."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from nemologger import lightning_port
from nemologger.combination import sweep_job
from nemologger.condition import flags_of, kind_of, suggests_arguments, texts_for_flags
from nemologger.disk.lock import DirectoryLock
from nemologger.disk.there import exists, is_dir
from nemologger.errors import ConfigurationError
from nemologger.ranks import decide, together, why_restarts_may_hang
from nemologger.run import files as run_files
from nemologger.run.directory import (
    VERSION_VARIABLE,
    RunDirectory,
    Version,
    check_local,
    check_name,
    choose_version,
    explicit_directory,
    run_directory,
)
from nemologger.run.log_files import LogFiles
from nemologger.run.record import EndOfLog, RunRecord, record_of
from nemologger.saving.checks import check_monitor, check_trainer
from nemologger.saving.settle import place, settle, unsettle
from nemologger.trackers import tensorboard, wandb
from nemologger.trackers.continued_steps import ContinuedSteps
from nemologger.trackers.tracker import Tracker, check_apart

log = logging.getLogger(__name__)


@suggests_arguments
@dataclass
class NeMoLogger:
    """Gives a run its directory, its log files, its trackers and its checkpoint callback.

    The run directory is ``log_dir / name / version``. In it are ``cmd-args.log`` (the command), ``git-info.log`` (hash,
    branch and uncommitted changes), a log file per rank, ``nemo_error_log.txt`` (warnings and errors),
    ``lightning_logs.txt``, ``task.json``, copies of ``files_to_copy``, and ``checkpoints/``. When the same directory is
    used again, the earlier life's log files move to ``run_0/``, ``run_1/``, …

    Set up logging (``logging.basicConfig``) before :meth:`setup`, which lets everything from level INFO on into the log
    files until the trainer is done; the console stays as it is.

    Args:
        name: Name of the experiment; one directory name.
        log_dir: Base directory of all experiments; default ``./nemo_experiments``.
        explicit_log_dir: The run directory itself, instead of ``log_dir``, ``name`` and ``version``.
        version: Name of this run among those of the experiment. Default: the environment variable
            ``NEMO_EXPM_VERSION``, else none if the run may resume, else date and time.
        use_datetime_version: Whether date and time are the last resort for a version; else the run has none.
        number_versions: ``version_0``, ``version_1``, … are the last resort instead, as Lightning's loggers count; not for
            a run that may resume.
        log_local_rank_0_only: Only the first process of each node writes a log file.
        log_global_rank_0_only: Only the first process of the run does.
        files_to_copy: Files to keep a copy of, a configuration for example.
        update_logger_directory: Let the trainer's TensorBoard and W&B loggers write to ``exp_dir / save_dir``. A
            relative ``save_dir``, or one inside the working directory, is meant; an absolute one elsewhere is kept.
            Those of :mod:`nemologger.trackers` write below the run directory.
        ckpt: The checkpoint callback: ours or Lightning's. It takes the place of a ModelCheckpoint of the trainer.
        tensorboard: A TensorBoardLogger, or a function that makes one; it takes the place of the logger that a Trainer
            makes by itself.
        wandb: A WandbLogger, or a function that makes one.
        extra_loggers: More of Lightning's loggers, or those of :mod:`nemologger.trackers`, which write to the run
            directory and go on where the resumed run does; or functions that make one.

    Raises:
        ConfigurationError: Arguments contradict each other, or cannot work.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> run = NeMoLogger(name="demo", log_dir=tempfile.mkdtemp(), version="v1").setup(Trainer(accelerator="cpu"))
        >>> sorted(path.name for path in run.log_dir.iterdir())[:2]
        ['cmd-args.log', 'lightning_logs.txt']
    """

    name: str = "default"
    log_dir: str | Path | None = None
    explicit_log_dir: str | Path | None = None
    version: str | None = None
    use_datetime_version: bool = True
    log_local_rank_0_only: bool = False
    log_global_rank_0_only: bool = False
    files_to_copy: list[str] | None = None
    update_logger_directory: bool = True
    ckpt: ModelCheckpoint | None = None
    tensorboard: TensorBoardLogger | Callable[[], TensorBoardLogger] | None = None
    wandb: WandbLogger | Callable[[], WandbLogger] | None = None
    extra_loggers: Sequence[Logger | Callable[[], Logger]] = field(default_factory=list)
    number_versions: bool = False

    def __post_init__(self) -> None:
        """Check the arguments together."""
        self._check()

    def setup(self, trainer: pl.Trainer, resume_if_exists: bool = False, task_config: Any = None) -> RunDirectory:
        """Prepare the run of ``trainer``. Collective: call it on every rank, before ``fit``.

        A second call for one trainer, with the same settings, changes nothing.

        Args:
            trainer: Gets the loggers and callbacks.
            resume_if_exists: The run may continue an earlier one: without a given version it gets none. The same as for
                the AutoResume.
            task_config: The fiddle configuration that the run was built from, kept as ``task.json``.

        Returns:
            The run directory: ``log_dir``, ``exp_dir``, ``name``, ``version``, ``checkpoint_dir``.

        Raises:
            ConfigurationError: Something cannot work: the settings, the directory, a monitor that can never appear. All
                ranks raise.
            NotFoundError: A file of ``files_to_copy`` is not there.
        """
        self._check()
        check_trainer(trainer, "NeMoLogger.setup")
        lightning_port.check_is_no_child()
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        settings = {k: list(v) if isinstance(v, list) else v for k, v in settings.items()}
        settings |= {"resume_if_exists": resume_if_exists, "task_config": task_config}
        earlier = record_of(trainer)
        if earlier is not None:
            earlier.check_same(settings)
            return earlier.run

        callbacks, replaced = place(trainer, self.ckpt)
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                check_monitor(trainer, callbacks, callback.monitor)
        loggers = self._loggers(trainer)
        ranks = lightning_port.ranks_before_fit(trainer)
        saving = [f"{type(c).__module__}.{type(c).__qualname__}" for c in callbacks if isinstance(c, Checkpoint)]
        plan = decide(ranks, lambda: self._choose_directory(trainer, callbacks, resume_if_exists) | {"saving": saving})
        run = RunDirectory(Path(plan["exp_dir"]), Path(plan["log_dir"]), plan["name"], plan["version"])
        if self.ckpt is not None:
            unsettle(self.ckpt, run)

        def settle_here() -> None:
            _check_saving(plan["saving"], saving)
            self._move(trainer, loggers, run)

        together(ranks, settle_here)
        # What is refused is refused by now: from here on the directory is this run's.
        notes, wandb_id = decide(ranks, lambda: self._write(trainer, run, loggers, task_config))
        log_files = LogFiles(
            run.log_dir,
            local_rank_0_only=self.log_local_rank_0_only,
            global_rank_0_only=self.log_global_rank_0_only,
        )
        try:
            together(ranks, lambda: log_files.attach(trainer.global_rank, trainer.local_rank))
            together(ranks, lambda: self._join_wandb(trainer, loggers, run, wandb_id))
        except BaseException:
            log_files.release()
            raise

        if trainer.global_rank == 0:
            unversioned = resume_if_exists and run.version is None and self.use_datetime_version
            why = " (without a version, so that the next start finds it again)" if unversioned else ""
            log.info("run directory: %s%s", run.log_dir, why)
            for note in filter(None, [*plan["notes"], *notes, *replaced, why_restarts_may_hang(trainer.world_size)]):
                log.warning("%s", note)
        settle(callbacks, run)
        record = RunRecord(run, settings, log_files, is_for_one_start=plan["is_for_one_start"])
        trainer.loggers = loggers
        _install(trainer, callbacks, record, EndOfLog(log_files))
        if lightning_port.forks_later(trainer):
            log_files.release()  # the processes that train attach their own
        return run

    def _check(self) -> None:
        """Check the settings against each other; the file system is not asked."""
        if wrong := texts_for_flags(flags_of(self)):
            raise ConfigurationError(f"NeMoLogger: {wrong}")
        if self.log_local_rank_0_only and self.log_global_rank_0_only:
            raise ConfigurationError(
                "log_local_rank_0_only and log_global_rank_0_only are both True: choose one log file per node or one "
                "for the whole run."
            )
        if self.number_versions and self.use_datetime_version:
            raise ConfigurationError(
                "number_versions=True numbers the runs instead of dating them: set use_datetime_version=False with it."
            )
        if self.explicit_log_dir is not None:
            others = {"log_dir": self.log_dir, "version": self.version}
            given = [f"{name}={value!r}" for name, value in others.items() if value]
            if given:
                raise ConfigurationError(
                    f"explicit_log_dir={str(self.explicit_log_dir)!r} is the run directory itself: "
                    f"{' and '.join(given)} cannot have an effect. Give one or the other."
                )
        check_name(self.name, "name")
        check_local(self.log_dir, "log_dir")
        check_local(self.explicit_log_dir, "explicit_log_dir")
        if self.version not in (None, ""):  # 0 is no text, and would count as none
            check_name(self.version, "version")
        if self.ckpt is not None and not isinstance(self.ckpt, ModelCheckpoint):
            raise ConfigurationError(
                "ckpt must be a ModelCheckpoint (nemologger's or lightning.pytorch.callbacks'), found "
                f"{kind_of(self.ckpt)}: {self.ckpt!r}"
            )
        if not isinstance(self.extra_loggers, (list, tuple)):
            raise ConfigurationError(
                f"extra_loggers must be a list of Lightning loggers, found {self.extra_loggers!r}."
            )

    # --- directory and files: rank 0 ------------------------------------------------------------------------------

    def _choose_directory(
        self, trainer: pl.Trainer, callbacks: Sequence[Callback], resume_if_exists: bool
    ) -> dict[str, Any]:
        """Choose the run directory and make it, or refuse. Plain values: they travel to the other ranks."""
        here = Path.cwd()
        run, notes, version = self._choose(trainer, here, resume_if_exists)
        # Lightning's launcher on several nodes has each node's first process come here; one of them writes.
        if trainer.global_rank != 0:
            return _plan(run, notes, version)
        run_files.to_copy(self.files_to_copy or [], here)  # else it is refused
        if version.numbered:
            log_dir = run_files.create_numbered(run.log_dir)
        else:
            log_dir = run_files.create(run.log_dir, fresh=version.dated)
        if log_dir != run.log_dir:
            run = RunDirectory(run.exp_dir, log_dir, run.name, log_dir.name)
        job = sweep_job()
        if job is not None:
            job.claim(run.log_dir)
        _refuse_if_in_use(run, callbacks)
        return _plan(run, notes, version)

    def _write(
        self, trainer: pl.Trainer, run: RunDirectory, loggers: Sequence[Logger], task: Any
    ) -> tuple[list[str], str | None]:
        """Write what describes the run, where an earlier life of it has moved aside: warnings, and the id for W&B."""
        if trainer.global_rank != 0:
            return [], None
        here = Path.cwd()
        copies = run_files.to_copy(self.files_to_copy or [], here)
        run_files.put_aside(run.log_dir, [*copies])
        notes = run_files.write(run, copies, task, here=here)
        wandb_loggers = [logger for logger in loggers if isinstance(logger, WandbLogger)]
        return notes, wandb.run_id(run.log_dir, wandb_loggers) if wandb_loggers else None

    def _choose(
        self, trainer: pl.Trainer, here: Path, resume_if_exists: bool
    ) -> tuple[RunDirectory, list[str], Version]:
        """The run directory, what to warn of, and where its version comes from."""
        if self.explicit_log_dir is not None:
            run = explicit_directory(self.explicit_log_dir, here=here)
            surprising = exists(run.log_dir) and not resume_if_exists
            notes = [f"explicit_log_dir={str(run.log_dir)!r} already exists"] if surprising else []
            return run, notes, Version(None)
        version = choose_version(
            self.version,
            environment=os.environ,
            resume_if_exists=resume_if_exists,
            use_datetime_version=self.use_datetime_version,
            number_versions=self.number_versions,
            now=datetime.now().astimezone(),
        )
        if (version.dated or version.numbered) and lightning_port.launches_on_each_node(trainer):
            raise ConfigurationError(
                f"Lightning starts this run's processes on {trainer.num_nodes} nodes, each node by itself: they cannot "
                "agree on a version made of date and time, or on a number. Give version=..., or set the variable "
                f"{VERSION_VARIABLE} to the same value on every node, or start the run with torchrun."
            )
        run = run_directory(self.name, version.text, log_dir=self.log_dir, here=here)
        return run, [], version

    # --- trackers -------------------------------------------------------------------------------------------------

    def _loggers(self, trainer: pl.Trainer) -> list[Logger]:
        """The trainer's loggers and ours, each once; none of them moved yet."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # it logs nothing, and ours are not to either
            return list(trainer.loggers)
        own = [
            logger
            for logger in trainer.loggers
            if self.tensorboard is None or not lightning_port.is_default_logger(trainer, logger)
        ]
        loggers: list[Logger] = []
        named: list[tuple[str, Any]] = [("logger", logger) for logger in own]
        named += [("tensorboard", self.tensorboard), ("wandb", self.wandb)]
        named += [("extra_loggers", logger) for logger in self.extra_loggers]
        for argument, given in named:
            if given is None:
                continue
            logger = given if isinstance(given, Logger) or not callable(given) else given()
            if not isinstance(logger, Logger):
                raise ConfigurationError(
                    f"NeMoLogger({argument}=...): expected one of Lightning's loggers, or a function that makes one, found "
                    f"{kind_of(logger)}: {logger!r}"
                )
            if not any(logger is other for other in loggers):
                loggers.append(logger)
        return loggers

    def _move(self, trainer: pl.Trainer, loggers: Sequence[Logger], run: RunDirectory) -> None:
        """Tell trackers but W&B their run and its directory, as far as they have not started to write.

        Raises:
            ConfigurationError: If two of them would write to one place.
        """
        for logger in loggers:
            if isinstance(logger, Tracker) and not logger.is_open:
                logger.settle(run, move=self.update_logger_directory)
            elif isinstance(logger, TensorBoardLogger) and not lightning_port.is_open(logger):
                is_default = lightning_port.is_default_logger(trainer, logger)
                if self.update_logger_directory and "://" not in str(logger.save_dir):
                    tensorboard.move(logger, run, _homes(trainer), is_default=is_default)
        check_apart(loggers)
        tensorboard.check_apart(loggers)

    def _join_wandb(
        self, trainer: pl.Trainer, loggers: Sequence[Logger], run: RunDirectory, wandb_id: str | None
    ) -> None:
        """Tell W&B's the run that its id names; name the loggers that stay where they are."""
        for logger in loggers:
            if not isinstance(logger, (TensorBoardLogger, WandbLogger, Tracker)):
                continue
            if isinstance(logger, WandbLogger):
                wandb.log_directories(logger)
            if logger.is_open if isinstance(logger, Tracker) else lightning_port.is_open(logger):
                if self.update_logger_directory and trainer.global_rank == 0:
                    log.warning(
                        "%s has already started to write to %s and stays there: set up the run before using the logger",
                        type(logger).__name__,
                        logger.save_dir,
                    )
            elif isinstance(logger, WandbLogger) and wandb_id is not None:
                wandb.move(logger, run, _homes(trainer), wandb_id, directory=self.update_logger_directory)


def _homes(trainer: pl.Trainer) -> list[str | Path]:
    """What trackers are told to write to when nobody has told them where."""
    return [Path.cwd(), os.path.abspath(trainer.default_root_dir)]


def _refuse_if_in_use(run: RunDirectory, callbacks: Sequence[Callback]) -> None:
    """Before anything is moved: the log files of a live run stay where they are.

    Raises:
        DirectoryInUseError: If another process writes checkpoints to where this run would.
    """
    savers = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    own = str(run.checkpoint_dir)
    for directory in {str(one.dirpath or own) for one in savers} or {own}:
        if "://" not in directory and is_dir(Path(directory)):
            lock = DirectoryLock(Path(directory))
            # Where nothing can be written nobody trains, and this run may only read there.
            with contextlib.suppress(ConfigurationError):
                lock.take()
            lock.release()


def _check_saving(on_rank_0: list[str], here: list[str]) -> None:
    """Refuse another checkpoint callback than rank 0's: each rank writes its part, and would wait for the others."""
    if here != on_rank_0:
        raise ConfigurationError(
            f"the checkpoint callbacks here are {here}, and {on_rank_0} on rank 0. Each rank writes its part of a "
            "checkpoint: give NeMoLogger(ckpt=...) on every rank, not on rank 0 alone."
        )


def _plan(run: RunDirectory, notes: list[str], version: Version) -> dict[str, Any]:
    return {
        "exp_dir": str(run.exp_dir),
        "log_dir": str(run.log_dir),
        "name": run.name,
        "version": run.version,
        "notes": notes,
        "is_for_one_start": version.dated or version.numbered,
    }


def _install(trainer: pl.Trainer, callbacks: list[Callback], record: RunRecord, end: EndOfLog) -> None:
    """Give the trainer its callbacks: checkpoints after all that training does, the end of the log after them."""
    others = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    lightning_port.callbacks(trainer)[:] = [*others, record, ContinuedSteps(), *checkpoints, end]
