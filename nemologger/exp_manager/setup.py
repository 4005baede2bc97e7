"""The call that sets a run up from a section: it makes what the plan says, and nothing else."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from nemologger.errors import CheckpointMisconfigurationError, ConfigurationError, LoggerMisconfigurationError
from nemologger.exp_manager.config import ExpManagerConfig, read
from nemologger.exp_manager.plan import Plan, TrainerLogger, translate
from nemologger.exp_manager.trackers import SWITCHES
from nemologger.lightning_port import callbacks, set_default_directory
from nemologger.run.record import close_log
from nemologger.saving.checks import check_trainer

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger("nemologger.exp_manager")


def exp_manager(trainer: pl.Trainer, cfg: Mapping[str, Any] | DictConfig | None = None) -> Path | None:
    """Set up the run of ``trainer`` as a NeMo 1 ``exp_manager`` section says. Collective: call it on every rank.

    The section becomes a :class:`~nemologger.NeMoLogger`, a :class:`~nemologger.ModelCheckpoint`, an
    :class:`~nemologger.AutoResume` and callbacks; ``python -m nemologger.migrate`` writes them down as a Python file.

    Args:
        trainer: Made with ``logger=False, enable_checkpointing=False``. Gets the loggers, the callbacks and the checkpoint
            to resume from.
        cfg: The section, with the fields of :class:`~nemologger.exp_manager.ExpManagerConfig`. None turns everything off.

    Returns:
        The run directory; None without ``cfg``, or for a trainer with ``fast_dev_run``.

    Raises:
        LoggerMisconfigurationError: The trainer has a logger, and the section asks for one.
        CheckpointMisconfigurationError: The trainer has a checkpoint callback, and the section asks for one.
        NotFoundError: There is no checkpoint to resume from, and ``resume_ignore_no_checkpoint`` is off.
        RunCompletedError: The run has completed, and ``resume_past_end`` is off.
        ConfigurationError: The section cannot work.
        OmegaConfBaseException: A key is unknown, of the wrong type, or cannot be resolved; the message names it.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> exp_manager(trainer, {"exp_dir": tempfile.mkdtemp(), "name": "demo", "version": "v1"}).name
        'v1'
    """
    check_trainer(trainer, "exp_manager(trainer, cfg)")
    if cfg is None:
        log.warning("exp_manager was given no cfg: it does nothing")
        return None
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        log.info("fast_dev_run: exp_manager does nothing")
        return None
    section = read(cfg)
    _check_working_directory()
    _check_nothing_twice(trainer, section.config)
    plan = translate(section, _logger_of(trainer))
    refused = plan.notes.of("refused")
    if refused:
        raise ConfigurationError("\n".join(f"{note}." for note in refused))
    callbacks_before, loggers_before = list(callbacks(trainer)), list(trainer.loggers)
    try:
        return _carry_out(plan, trainer)
    except BaseException:
        # The same trainer can be set up again, with a section that works.
        close_log(trainer)
        callbacks(trainer)[:] = callbacks_before
        trainer.loggers = loggers_before
        raise


def _carry_out(plan: Plan, trainer: pl.Trainer) -> Path:
    logger = plan.log.make()
    added = [call.make() for call in plan.callbacks]
    own = callbacks(trainer)
    if any(call.target.name == "MaxTimePerRun" for call in plan.callbacks):
        for timer in [callback for callback in own if isinstance(callback, Timer)]:
            log.warning("exp_manager.max_time_per_run replaces the trainer's %s", type(timer).__name__)
            own.remove(timer)
    own[:] = [*(call.make() for call in plan.first), *own, *added]
    resume = plan.resume.make()
    run = logger.setup(trainer, resume_if_exists=resume.resume_if_exists)
    if trainer.global_rank == 0:
        for note in plan.notes.of("warned"):
            log.warning("%s", note)
        for note in plan.notes.of("told"):
            log.info("%s", note)
    resume.setup(trainer)
    directory: Path = run.log_dir
    set_default_directory(trainer, directory)
    return directory


def _check_working_directory() -> None:
    # Hydra is here if it started this program; if not, there is nothing to ask it.
    hydra = sys.modules.get("hydra.core.hydra_config")
    if hydra is None or not hydra.HydraConfig.initialized():
        return
    started_in = str(hydra.HydraConfig.get().runtime.cwd)
    if os.path.realpath(started_in) != os.path.realpath(os.getcwd()):
        raise ConfigurationError(
            f"Hydra changed the working directory from {started_in} to {os.getcwd()}: each rank, and the next start of the "
            "run, would look for its directory somewhere else. Pass hydra.job.chdir=False hydra.run.dir=. to the script."
        )


def _check_nothing_twice(trainer: pl.Trainer, config: ExpManagerConfig) -> None:
    """Refuse a trainer that has already what the section asks for.

    Raises:
        LoggerMisconfigurationError: A logger.
        CheckpointMisconfigurationError: A checkpoint callback.
    """
    if trainer.loggers:
        logger = type(trainer.loggers[0]).__name__
        wanted = [switch for switch in SWITCHES if getattr(config, switch)]
        if wanted:
            raise LoggerMisconfigurationError(
                f"the trainer already has a {logger}, and exp_manager is to make one as well "
                f"({', '.join(f'{switch}=True' for switch in wanted)}). Make the trainer with logger=False, or turn these "
                "switches off."
            )
        placed = [key for key in ("explicit_log_dir", "name") if getattr(config, key)]
        if config.exp_dir and trainer.loggers[0].save_dir:
            placed.append("exp_dir")
        if placed:
            raise LoggerMisconfigurationError(
                f"the trainer already has a {logger}, whose directory is the run's, and the section says where the run is, "
                f"too ({', '.join(placed)}). Make the trainer with logger=False, or leave these keys out."
            )
    if config.create_checkpoint_callback:
        for callback in callbacks(trainer):
            if isinstance(callback, ModelCheckpoint):
                raise CheckpointMisconfigurationError(
                    f"the trainer already has a {type(callback).__name__}, and exp_manager is to make a checkpoint callback "
                    "as well. Make the trainer with enable_checkpointing=False, or set create_checkpoint_callback=False."
                )


def _logger_of(trainer: pl.Trainer) -> TrainerLogger | None:
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    version = logger.version
    return TrainerLogger(
        save_dir=None if logger.save_dir is None else str(logger.save_dir),
        name=logger.name or None,
        version=f"version_{version}" if isinstance(version, int) else version or None,
    )
