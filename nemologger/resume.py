"""From which checkpoint a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from nemologger import names
from nemologger.callbacks.restore_weights import RestoreWeights, restore_tokenizer
from nemologger.callbacks.resume_once import ResumeOnce
from nemologger.checkpoint.find import Found
from nemologger.checkpoint.manifest import Manifest
from nemologger.condition import flags_of, suggests_arguments, texts_for_flags
from nemologger.disk.there import exists, is_dir
from nemologger.errors import ConfigurationError, NotFoundError
from nemologger.lightning_port import callbacks, ranks_before_fit, requeue_file
from nemologger.loading import checkpoint_io, leftovers
from nemologger.loading.choice import named, newest_in, start_of, warn_of_newer
from nemologger.loading.verified_reads import Ask, VerifiedReads, faults
from nemologger.ranks import decide_with_help
from nemologger.run.record import record_of, refusals_noted, run_of
from nemologger.saving.checks import check_trainer
from nemologger.saving.kept_checkpoints import ours
from nemologger.saving.monitor import DEFAULT_MAX_EPOCHS
from nemologger.stores.client import before_training
from nemologger.stores.path import check_options, in_store, is_path, storage_path

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

_NO_HOOKS = (
    "Lightning calls no hooks where max_steps is reached already: if the run was killed behind its last save, what "
    "on_train_epoch_end and on_train_end do has not been done"
)


@suggests_arguments
@dataclass(frozen=True)
class RestoreConfig:
    """Where a new run takes its first weights from.

    Args:
        path: A run directory (its newest checkpoint is used), a checkpoint, or its ``weights/``.
        load_model_state: Load the model's parameters and buffers.
        load_optim_state: Load the optimizers' state too.
        load_artifacts: Take the model's tokenizer from the checkpoint's context, if the model has that attribute.

    Example:
        >>> RestoreConfig(path="runs/base/checkpoints").load_optim_state
        False
    """

    path: str
    load_model_state: bool = True
    load_optim_state: bool = False
    load_artifacts: bool = True

    def __post_init__(self) -> None:
        """Check the types; whether the path is there is seen when it is used."""
        if wrong := texts_for_flags(flags_of(self)):
            raise ConfigurationError(f"RestoreConfig: {wrong}")
        if not is_path(self.path):
            raise ConfigurationError(f"RestoreConfig(path={self.path!r}): a path is needed")


@dataclass(frozen=True)
class Resumed:
    """What :meth:`AutoResume.setup` has arranged.

    Attributes:
        path: The checkpoint that training goes on from, or None.
        step: Its optimizer step; 0 without one, or if it has no manifest.
        finished: The run has nothing left to train.
        weights_from: The checkpoint that a new run takes its weights from, or None.
    """

    path: Path | None = None
    step: int = 0
    finished: bool = False
    weights_from: Path | None = None


@suggests_arguments
@dataclass
class AutoResume:
    """Finds the checkpoint to go on from, and hands it to the trainer.

    In this order: ``resume_from_path``; the newest complete checkpoint of ``resume_from_directory``, or with
    ``resume_if_exists`` of the run directory; ``restore_config``; else training starts from scratch.

    A checkpoint is verified (size and checksum of every file) before it is used. A damaged or unfinished one is reported,
    and the newest complete one is used instead.

    Args:
        restore_config: Weights for a run that has no checkpoint of its own yet.
        resume_from_directory: A directory of checkpoints to look in, instead of the run's own.
        resume_from_path: One checkpoint, whatever else is there: every start with it begins there again.
        resume_if_exists: Look for checkpoints in the run directory.
        resume_past_end: Go on from an ``*-end`` checkpoint, which says that its run has completed.
        resume_ignore_no_checkpoint: Start from scratch, with a warning, when there is no checkpoint; else that is an error.
        start_from: A checkpoint to go on from, optimizer and all, while there is none of the run's own: where the first of
            several jobs starts. Needs ``resume_if_exists`` or ``resume_from_directory``.
        path: Older name of ``resume_from_path``.
        dirpath: Older name of ``resume_from_directory``.
        import_path: Older name of ``restore_config=RestoreConfig(path=...)``.
        storage_options: For paths that are URLs (all of them may be): what the fsspec file system takes beyond the usual
            environment. In the run's own directory those of its ModelCheckpoint count.

    Example:
        >>> AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).resume_past_end
        False
    """

    restore_config: RestoreConfig | None = None
    resume_from_directory: str | Path | None = None
    resume_from_path: str | Path | None = None
    resume_if_exists: bool = False
    resume_past_end: bool = False
    resume_ignore_no_checkpoint: bool = False
    path: InitVar[str | Path | None] = None
    dirpath: InitVar[str | Path | None] = None
    import_path: InitVar[str | Path | None] = None
    start_from: str | Path | None = None
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    _own_directory: Path | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(
        self, path: str | Path | None, dirpath: str | Path | None, import_path: str | Path | None
    ) -> None:
        """Take the older names, and check the arguments together."""
        if wrong := texts_for_flags(flags_of(self)):
            raise ConfigurationError(f"AutoResume: {wrong}")
        self.resume_from_path = _older("path", path, "resume_from_path", self.resume_from_path)
        self.resume_from_directory = _older("dirpath", dirpath, "resume_from_directory", self.resume_from_directory)
        imported = None if import_path is None else RestoreConfig(path=str(import_path))
        self.restore_config = _older("import_path", imported, "restore_config", self.restore_config)
        for name in ("resume_from_path", "resume_from_directory", "start_from"):
            given = getattr(self, name)
            if given is not None and not is_path(given):
                raise ConfigurationError(
                    f"AutoResume({name}={given!r}): expected a path, or a URL such as s3://bucket/key"
                )
        check_options(self.storage_options)
        if self.start_from is not None and (not self._wants_checkpoint or self.resume_from_path is not None):
            raise ConfigurationError(
                f"AutoResume(start_from={str(self.start_from)!r}) is for a run that looks for checkpoints of its own: set "
                "resume_if_exists=True with it, or give the checkpoint as resume_from_path"
            )
        if self.restore_config is not None and not isinstance(self.restore_config, RestoreConfig):
            raise ConfigurationError(
                f"AutoResume(restore_config={self.restore_config!r}): expected a RestoreConfig, for example "
                "RestoreConfig(path='runs/base')"
            )

    def setup(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule | None = None,
        *,
        stage: Literal["fit", "validate"] = "fit",
    ) -> Resumed:
        """Arrange that ``trainer.fit`` goes on from the right checkpoint. Collective: call it on every rank.

        Args:
            trainer: Its ``ckpt_path`` is set. Call ``NeMoLogger.setup`` first, for the run directory.
            model: Gets the tokenizer of ``restore_config``, if there is one.
            stage: What the trainer will do; validation also takes a checkpoint that has no optimizer state.

        Returns:
            What was found. With ``finished``, ``fit`` takes no step. Where ``max_steps`` is reached, it calls no hooks of
            training either; after the last epoch it calls those that end it, if this was saved in front of them.

        Raises:
            NotFoundError: If there is no checkpoint, and starting from scratch was not allowed.
            RunCompletedError: If the run has completed, and going on was not asked for.
            DamagedCheckpointError: If there are checkpoints, but none that can be trusted.
            UnfinishedCheckpointError: If there are only unfinished ones.
        """
        check_trainer(trainer, "AutoResume.setup")
        self._own_directory = _directory_of(trainer)
        self._check_own_directory(trainer)
        model = getattr(model, "_orig_mod", model)  # of torch.compile(module), which fit takes, the module
        keep = checkpoint_io.keeps(trainer, model, optimizer=stage == "fit")
        ranks = ranks_before_fit(trainer)
        read = VerifiedReads(ranks, keep)
        with refusals_noted(trainer):
            found: dict[str, Any] = decide_with_help(
                ranks, lambda ask: self._ask(trainer, stage, read, ask), read.share, read.progress
            )
        path = None if found["path"] is None else self._path(found["path"])
        weights = None if found["weights_from"] is None else self._path(found["weights_from"])
        checkpoint_io.install(trainer, path)
        if path is not None:
            trainer.ckpt_path = str(path)
            checkpoint_io.keep(trainer, path, read.checkpoints.get(path))
            others = [callback for callback in callbacks(trainer) if not isinstance(callback, ResumeOnce)]
            callbacks(trainer)[:] = [*others, ResumeOnce(str(path))]
            log.info("resuming from %s (step %d)", path, found["step"])
        elif trainer.is_global_zero and trainer.ckpt_path is None and all(c.save_weights_only for c in ours(trainer)):
            _tell_of_requeue_file(trainer)
        if found["finished"] and stage == "fit":
            log.warning(
                "nothing is left to train: %s is at step %d, and the trainer stops at %s: raise that to go on",
                path,
                found["step"],
                _limits(trainer),
            )
            if 0 <= trainer.max_steps <= found["step"]:
                log.info(_NO_HOOKS)
        if weights is not None and self.restore_config is not None:
            config = self.restore_config
            RestoreWeights.attach(trainer, weights, model=config.load_model_state, optimizer=config.load_optim_state)
            if config.load_artifacts:
                restore_tokenizer(model, weights)
        return Resumed(path, found["step"], found["finished"], weights)

    def get_weights_path(self, path: str | Path) -> Path:
        """The ``weights/`` of the checkpoint ``path``."""
        return self._path(path) / names.WEIGHTS

    def get_context_path(self, model: pl.LightningModule | None = None) -> Path | None:
        """The ``context/`` of the checkpoint to go on from, or None."""
        path = self.get_trainer_ckpt_path(model)
        context = None if path is None else path / names.CONTEXT
        return context if context is not None and is_dir(context) else None

    def get_trainer_ckpt_path(self, model: pl.LightningModule | None = None) -> Path | None:
        """The checkpoint to go on from, or None. Looks anew each time; after :meth:`setup` also in the run directory.

        Raises:
            NotFoundError: As :meth:`setup`; so are the others.
        """
        found = self._choose()
        return None if found is None else found.path

    # --- looking --------------------------------------------------------------------------------------------------

    def _ask(self, trainer: pl.Trainer, stage: str, read: VerifiedReads, ask: Ask) -> dict[str, Any]:
        with before_training("Whether there is a checkpoint to resume from"):
            return self._find(trainer, stage, read, ask)

    def _find(self, trainer: pl.Trainer, stage: str, read: VerifiedReads, ask: Ask) -> dict[str, Any]:
        """What rank 0 sees and decides; plain values, they travel to the other ranks."""
        max_epochs = trainer.max_epochs
        is_timed = any(isinstance(callback, Timer) for callback in callbacks(trainer))
        if max_epochs is None and trainer.max_steps == -1 and not is_timed:
            max_epochs = DEFAULT_MAX_EPOCHS

        def is_finished(manifest: Manifest | None) -> bool:
            return manifest is not None and manifest.is_finished(max_steps=trainer.max_steps, max_epochs=max_epochs)

        def suitable(found: Found) -> str | None:
            manifest = found.manifest
            if stage != "fit" or manifest is None or manifest.has_optimizer or is_finished(manifest):
                return None
            return (
                "it holds no optimizer state, and training is to go on past it (save_weights_only, "
                "save_optim_on_train_end=False or save_last_n_optim_states)"
            )

        own = self._own_directory
        if stage == "fit" and own is not None and own == self._directory and self._wants_checkpoint:
            leftovers.finish(own)
        chosen = self._choose(suitable, lambda checkpoint: read.faults(checkpoint, ask))
        if chosen is None and self.start_from is not None:
            start = self._path(self.start_from).expanduser().absolute()
            chosen = named(start, lambda checkpoint: read.faults_only(checkpoint, ask))
        if chosen is None:
            return {"path": None, "step": 0, "finished": False, "weights_from": self._start_weights(read, ask)}
        if stage == "fit" and self.resume_from_path is not None:
            warn_of_newer(chosen, self._own_directory)
        step, finished = chosen.manifest.step if chosen.manifest else 0, is_finished(chosen.manifest)
        return {"path": str(chosen.path), "step": step, "finished": finished, "weights_from": None}

    def _start_weights(self, read: VerifiedReads, ask: Ask) -> str | None:
        """Where there is nothing to go on from: the weights to begin with, None for those that the program makes.

        Raises:
            NotFoundError: There must be a checkpoint.
        """
        if self.restore_config is not None:
            base = self._path(self.restore_config.path)
            return str(start_of(base, lambda checkpoint: read.faults_only(checkpoint, ask)))
        if self._wants_checkpoint:
            where = str(self._directory or "the run directory")
            given = None if self.resume_from_directory is None else self._path(self.resume_from_directory).expanduser()
            if given is not None and in_store(given) is None and not is_dir(given):
                where += " (it is a file)" if exists(given) else " (no such directory)"
            if not self.resume_ignore_no_checkpoint:
                raise NotFoundError(
                    f"there is no checkpoint in {where} to resume from. For the first run of a new directory pass "
                    "resume_ignore_no_checkpoint=True."
                )
            log.warning("there is no checkpoint in %s: training starts from scratch", where)
        return None

    @property
    def _wants_checkpoint(self) -> bool:
        return self.resume_if_exists or self.resume_from_directory is not None

    @property
    def _directory(self) -> Path | None:
        if self.resume_from_directory is not None:
            return self._path(self.resume_from_directory).expanduser().absolute()
        return self._own_directory

    def _check_own_directory(self, trainer: pl.Trainer) -> None:
        """Warn of looking for checkpoints where no start will find one to go on from."""
        record = record_of(trainer)
        if record is None or not self.resume_if_exists or self.resume_from_directory or self.resume_from_path:
            return
        if record.is_for_one_start and self._own_directory == record.run.checkpoint_dir:
            log.warning(
                "AutoResume(resume_if_exists=True): the run directory %s is for this start alone, so no start will find a "
                "checkpoint of another. Call NeMoLogger.setup(trainer, resume_if_exists=True), or give the NeMoLogger a "
                "version.",
                record.run.log_dir,
            )
        savers = ours(trainer)
        if savers and all(one.save_weights_only for one in savers):
            log.warning(
                "AutoResume(resume_if_exists=True): ModelCheckpoint(save_weights_only=True) saves no optimizer state, "
                "and no later start can go on from such a checkpoint. Leave it out, or add a ModelCheckpoint that saves all."
            )

    def _path(self, where: str | Path) -> Path:
        """The path that ``where`` names; in the run's own directory, with the options of its ModelCheckpoint."""
        own = None if self._own_directory is None else in_store(self._own_directory)
        inside = own is not None and f"{where}/".startswith(f"{own}/")
        return storage_path(where, own.store.options if own is not None and inside else self.storage_options)

    def _choose(
        self,
        suitable: Callable[[Found], str | None] = lambda found: None,
        faults: Callable[[Path], list[str]] = faults,
    ) -> Found | None:
        if self.resume_from_path is not None:
            return named(self._path(self.resume_from_path).expanduser().absolute(), faults)
        directory = self._directory
        if not self._wants_checkpoint:
            return None
        if directory is None:
            raise ConfigurationError(
                "AutoResume(resume_if_exists=True) does not know where this run's checkpoints are: call "
                "NeMoLogger.setup(trainer, resume_if_exists=True) first, give the ModelCheckpoint a dirpath, or set "
                "resume_from_directory"
            )
        return newest_in(
            directory,
            faults,
            suitable,
            past_end=self.resume_past_end,
            is_named=self.resume_from_directory is not None,
        )


def _limits(trainer: pl.Trainer) -> str:
    """What ends the run, as its Trainer was given it."""
    given = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    limits = [f"{name}={value}" for name, value in given.items() if value not in (None, -1)]
    return " or ".join(limits or [f"max_epochs={DEFAULT_MAX_EPOCHS}"])


def _tell_of_requeue_file(trainer: pl.Trainer) -> None:
    file = requeue_file(trainer)
    if file is not None:
        log.warning(
            "this run goes on from %s: Lightning has left it there when Slurm requeued a job, perhaps another one, and "
            "loads it where nothing else was found. Remove it to start anew. With a nemologger.ModelCheckpoint such files "
            "are neither written nor loaded.",
            file,
        )


def _directory_of(trainer: pl.Trainer) -> Path | None:
    """Where this run writes its checkpoints."""
    # Others, OnExceptionCheckpoint among them, also have a directory, in which the run does not go on.
    own = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    for callback in sorted(own, key=lambda callback: not hasattr(callback, "storage_options")):
        directory = callback.dirpath
        is_ours = hasattr(callback, "storage_options")
        if directory is not None and ("://" not in str(directory) or is_ours):
            return storage_path(str(directory), getattr(callback, "storage_options", None)).absolute()
    run = run_of(trainer)
    return None if run is None else run.checkpoint_dir


def _older(old: str, value: Any, new: str, current: Any) -> Any:
    if value is None:
        return current
    if current is not None:
        raise ConfigurationError(
            f"AutoResume({old}=..., {new}=...): {old} is the older name of {new}; give one of them"
        )
    log.warning("AutoResume(%s=...) is the older name of %s", old, new)
    return value
