"""Lightning's loggers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    import lightning.pytorch as pl


def is_default_logger(trainer: pl.Trainer, logger: Logger) -> bool:
    """Whether ``logger`` is the one a Trainer makes when it is given none."""
    return (
        type(logger) in (TensorBoardLogger, CSVLogger)
        and logger.name == "lightning_logs"
        and os.path.abspath(str(logger.save_dir)) == os.path.abspath(str(trainer.default_root_dir))
    )


def set_default_directory(trainer: pl.Trainer, directory: Path) -> None:
    """Have Lightning, and callbacks that ask it, write to ``directory`` what nobody has said another place for."""
    trainer._default_root_dir = str(directory)  # type: ignore[attr-defined]  # set by a connector


def is_open(logger: Logger) -> bool:
    """Whether ``logger`` has already started to write."""
    return getattr(logger, "_experiment", None) is not None


def flat_params(params: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters without nesting: ``{"a": {"b": 1}}`` is ``{"a/b": 1}``, and callables are their names."""
    flat = _flatten_dict(params)
    return {key: getattr(value, "__name__", str(value)) if callable(value) else value for key, value in flat.items()}


def move_tensorboard(
    logger: TensorBoardLogger, save_dir: Path, name: str, version: str, *, default_hp_metric: bool | None = None
) -> None:
    """Build ``logger`` again so that it writes to ``save_dir / name / version``; all else stays as it was given."""
    logger.__init__(  # type: ignore[misc]  # the same object: the caller may hold it
        save_dir=str(save_dir),
        name=name,
        version=version,
        log_graph=logger._log_graph,
        default_hp_metric=logger._default_hp_metric if default_hp_metric is None else default_hp_metric,
        prefix=logger._prefix,
        sub_dir=logger.sub_dir,
        **logger._kwargs,
    )


def tensorboard_place(logger: TensorBoardLogger) -> str | None:
    """Where ``logger`` writes; None if it will count its versions when it begins."""
    if logger._version is None:
        return None
    return logger.log_dir if "://" in logger.log_dir else os.path.abspath(logger.log_dir)


def reopen_tensorboard(logger: TensorBoardLogger) -> None:
    """Let ``logger`` write to another file from now on, which it opens when it next has something to write."""
    logger._experiment = None


def move_wandb(logger: WandbLogger, save_dir: Path, run_id: str) -> None:
    """Build ``logger`` again so that it writes below ``save_dir`` and continues the run ``run_id``."""
    settings = {k: v for k, v in logger._wandb_init.items() if k not in {"dir", "id", "anonymous", "name", "project"}}
    settings["settings"] = _flushing_soon(settings.get("settings"))
    logger.__init__(  # type: ignore[misc]  # the same object: the caller may hold it
        name=logger._wandb_init["name"],
        save_dir=str(save_dir),
        offline=logger._offline,
        id=run_id,
        anonymous=bool(logger._wandb_init["anonymous"]) or None,
        project=logger._wandb_init["project"],
        log_model=logger._log_model,
        prefix=logger._prefix,
        checkpoint_name=logger._checkpoint_name,
        add_file_policy=logger.add_file_policy,
        **settings,
    )


def _flushing_soon(settings: Any) -> Any:
    """W&B's settings with what it has logged written to its file every second: else a killed run loses 15 s of it."""
    from wandb import Settings

    interval = "x_transaction_log_flush_interval"
    if interval not in Settings.model_fields or f"WANDB__{interval.removeprefix('x_').upper()}" in os.environ:
        return settings  # an earlier W&B knows no such setting
    if settings is None:
        return {interval: 1.0}
    if isinstance(settings, dict):
        return {interval: 1.0, **settings}
    if interval not in settings.model_fields_set:
        settings = settings.model_copy(update={interval: 1.0})
    return settings


def wandb_run_id(logger: WandbLogger) -> str | None:
    """The run id that ``logger`` was given, if any."""
    run_id: str | None = logger._wandb_init.get("id")
    return run_id


def log_wandb_checkpoints_by(logger: WandbLogger, log: Callable[[ModelCheckpoint], None]) -> None:
    """Have ``log`` called where ``logger`` would log the checkpoints that are files."""
    if logger._log_model:
        logger._scan_and_log_checkpoints = log  # type: ignore[method-assign,assignment]


def log_wandb_files(logger: WandbLogger, checkpoint: ModelCheckpoint) -> None:
    """Log the checkpoints that are files."""
    type(logger)._scan_and_log_checkpoints(logger, checkpoint)


def wandb_artifact(logger: WandbLogger) -> str | None:
    """What ``logger`` was told to call the artifact of checkpoints."""
    return logger._checkpoint_name


def wandb_metric(logger: WandbLogger, key: str) -> str:
    """What ``logger`` calls the metric ``key``."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{key}" if logger._prefix else key
