"""NeMo 2.0's experiment management for any PyTorch Lightning model.

Names are imported when they are first used: ``import nemologger`` itself costs almost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import nemologger.exp_manager as exp_manager  # noqa: F401  submodules, which mypy sees only this way
    import nemologger.io as io  # noqa: F401
    from nemologger.combination import SweepJob as SweepJob
    from nemologger.combination import sweep_job as sweep_job
    from nemologger.defaults import default_log as default_log
    from nemologger.defaults import default_resume as default_resume
    from nemologger.defaults import tensorboard_logger as tensorboard_logger
    from nemologger.defaults import wandb_logger as wandb_logger
    from nemologger.errors import CheckpointError as CheckpointError
    from nemologger.errors import CheckpointMisconfigurationError as CheckpointMisconfigurationError
    from nemologger.errors import ConfigurationError as ConfigurationError
    from nemologger.errors import ContextError as ContextError
    from nemologger.errors import DamagedCheckpointError as DamagedCheckpointError
    from nemologger.errors import DirectoryInUseError as DirectoryInUseError
    from nemologger.errors import LoggerMisconfigurationError as LoggerMisconfigurationError
    from nemologger.errors import ModelMismatchError as ModelMismatchError
    from nemologger.errors import NemologgerError as NemologgerError
    from nemologger.errors import NotFoundError as NotFoundError
    from nemologger.errors import RankError as RankError
    from nemologger.errors import RefusedError as RefusedError
    from nemologger.errors import RunCompletedError as RunCompletedError
    from nemologger.errors import SaveFailedError as SaveFailedError
    from nemologger.errors import SweepError as SweepError
    from nemologger.errors import UnfinishedCheckpointError as UnfinishedCheckpointError
    from nemologger.export import export_weights as export_weights
    from nemologger.export import load_model as load_model
    from nemologger.export import load_weights as load_weights
    from nemologger.logger import NeMoLogger as NeMoLogger
    from nemologger.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from nemologger.one_lightning import use_one_lightning as use_one_lightning
    from nemologger.resume import AutoResume as AutoResume
    from nemologger.resume import RestoreConfig as RestoreConfig
    from nemologger.resume import Resumed as Resumed
    from nemologger.run.directory import RunDirectory as RunDirectory
    from nemologger.run.record import run_of as run_of
    from nemologger.sweeps.runner import hydra_runner as hydra_runner
    from nemologger.tasks import finetune as finetune
    from nemologger.tasks import pretrain as pretrain
    from nemologger.tasks import train as train
    from nemologger.tasks import validate as validate
    from nemologger.trainer import Trainer as Trainer
    from nemologger.verify import Verification as Verification
    from nemologger.verify import verify_checkpoint as verify_checkpoint

_HOMES = {
    "nemologger.combination": ("SweepJob", "sweep_job"),
    "nemologger.defaults": ("default_log", "default_resume", "tensorboard_logger", "wandb_logger"),
    "nemologger.errors": (
        "CheckpointError",
        "CheckpointMisconfigurationError",
        "ConfigurationError",
        "ContextError",
        "DamagedCheckpointError",
        "DirectoryInUseError",
        "LoggerMisconfigurationError",
        "ModelMismatchError",
        "NemologgerError",
        "NotFoundError",
        "RankError",
        "RefusedError",
        "RunCompletedError",
        "SaveFailedError",
        "SweepError",
        "UnfinishedCheckpointError",
    ),
    "nemologger.export": ("export_weights", "load_model", "load_weights"),
    "nemologger.logger": ("NeMoLogger",),
    "nemologger.model_checkpoint": ("ModelCheckpoint",),
    "nemologger.one_lightning": ("use_one_lightning",),
    "nemologger.resume": ("AutoResume", "RestoreConfig", "Resumed"),
    "nemologger.run.directory": ("RunDirectory",),
    "nemologger.run.record": ("run_of",),
    "nemologger.sweeps.runner": ("hydra_runner",),
    "nemologger.tasks": ("finetune", "pretrain", "train", "validate"),
    "nemologger.trainer": ("Trainer",),
    "nemologger.verify": ("Verification", "verify_checkpoint"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

# Modules, not what is in them: a function of the name would be replaced by its module once somebody imports that.
_MODULES = ("exp_manager", "io")

__all__ = sorted([*_HOME_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    """Import what was asked for."""
    if name in _MODULES:
        return import_module(f"nemologger.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nemologger' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__
