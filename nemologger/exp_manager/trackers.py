"""The trackers that a section asks for, as arguments of NeMoLogger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from nemologger.exp_manager.calls import Call, Name
from nemologger.exp_manager.config import ExpManagerConfig, Section, plain
from nemologger.exp_manager.notes import Notes

TRACKERS = "nemologger.trackers"
LOGGERS = "lightning.pytorch.loggers"

# The switch of each tracker, and its parameters.
SWITCHES = {
    "create_tensorboard_logger": "summary_writer_kwargs",
    "create_wandb_logger": "wandb_logger_kwargs",
    "create_mlflow_logger": "mlflow_logger_kwargs",
    "create_dllogger_logger": "dllogger_logger_kwargs",
    "create_clearml_logger": "clearml_logger_kwargs",
    "create_neptune_logger": "neptune_logger_kwargs",
}


def calls(section: Section, notes: Notes) -> dict[str, Any]:
    """The arguments ``tensorboard``, ``wandb`` and ``extra_loggers`` of NeMoLogger, as far as they are needed."""
    config = section.config
    arguments: dict[str, Any] = {}
    if config.create_tensorboard_logger:
        arguments["tensorboard"] = _tensorboard(config, notes)
    if config.create_wandb_logger:
        arguments["wandb"] = _wandb(config, notes)
    extra = []
    if config.create_mlflow_logger:
        extra.append(_mlflow(config, notes))
    if config.create_dllogger_logger:
        extra.append(_dllogger(config, notes))
    if config.create_clearml_logger:
        extra.append(Call(Name(TRACKERS, "ClearMLLogger"), plain(config.clearml_logger_kwargs)))
    if config.create_neptune_logger:
        notes.refuse(
            "create_neptune_logger",
            "cannot work: Neptune's service closed in March 2026, and Lightning has no logger for it any more. Use "
            "create_tensorboard_logger, create_wandb_logger, create_mlflow_logger or create_clearml_logger instead",
        )
        if config.neptune_logger_kwargs:
            notes.warn("neptune_logger_kwargs", f"has no effect: {', '.join(map(str, config.neptune_logger_kwargs))}")
    return {**arguments, "extra_loggers": extra} if extra else arguments


def _arguments(key: str, kwargs: Mapping[Any, Any] | None, notes: Notes) -> dict[str, Any]:
    """The keys of a free section that can be arguments."""
    arguments = {}
    for name, value in (kwargs or {}).items():
        if isinstance(name, str) and name.isidentifier() and not iskeyword(name):
            arguments[name] = value
        else:
            notes.refuse(f"{key}.{name}", "cannot be set: no argument has such a name")
    return arguments


def _tensorboard(config: ExpManagerConfig, notes: Notes) -> Call:
    kwargs = _arguments("summary_writer_kwargs", config.summary_writer_kwargs, notes)
    for key in ("log_dir", "save_dir", "name", "version"):
        if key in kwargs:
            notes.refuse(
                f"summary_writer_kwargs.{key}",
                "cannot be set: TensorBoard writes to the run directory. Choose that one with exp_dir, name and version, "
                "or explicit_log_dir",
            )
            del kwargs[key]
    # NeMoLogger puts a relative save_dir below the base directory, and adds the version.
    name = "" if config.explicit_log_dir else config.name or "default"
    return Call(Name(LOGGERS, "TensorBoardLogger"), {"save_dir": ".", "name": name, **kwargs})


def _wandb(config: ExpManagerConfig, notes: Notes) -> Call:
    kwargs = _arguments("wandb_logger_kwargs", config.wandb_logger_kwargs, notes)
    if "name" not in kwargs and "project" not in kwargs:
        notes.refuse("wandb_logger_kwargs", "needs name and project when create_wandb_logger is on")
    if "version" not in kwargs and "id" not in kwargs:
        notes.tell(
            "create_wandb_logger",
            "gives the W&B run an id of its own, kept in wandb_id.txt of the run directory; NeMo 1 took the version, which "
            "two runs may share",
        )
    save_dir = kwargs.pop("save_dir", None) or "."
    if save_dir != "." and not os.path.isabs(save_dir):
        notes.tell(
            "wandb_logger_kwargs.save_dir", "is below the base directory of the runs, not below the working directory"
        )
    return Call(Name(LOGGERS, "WandbLogger"), {"save_dir": save_dir, **kwargs})


def _mlflow(config: ExpManagerConfig, notes: Notes) -> Call:
    kwargs = plain(config.mlflow_logger_kwargs)
    kwargs["experiment_name"] = kwargs["experiment_name"] or config.name or "default"
    if config.version:
        kwargs["run_name"] = config.version
    else:
        notes.tell("create_mlflow_logger", "lets MLflow name its run; NeMo 1 took the version, which is not known yet")
    if not kwargs["tracking_uri"]:
        notes.tell(
            "mlflow_logger_kwargs.tracking_uri",
            "is not set: MLFLOW_TRACKING_URI counts, else there is a mlflow.db (MLflow 3 has no file store) in save_dir, "
            "which is below the run directory if relative",
        )
    return Call(Name(TRACKERS, "MLFlowLogger"), kwargs)


def _dllogger(config: ExpManagerConfig, notes: Notes) -> Call:
    kwargs = plain(config.dllogger_logger_kwargs)
    if kwargs["json_file"] and not os.path.isabs(kwargs["json_file"]):
        notes.tell(
            "dllogger_logger_kwargs.json_file",
            "is below the run directory if relative, not below the working directory",
        )
    return Call(Name(TRACKERS, "DLLogger"), kwargs)
