"""exp_manager sections and trainers for tests."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from toy import ToyDataModule, ToyModel, quiet_trainer

from nemologger.exp_manager.config import NESTED, ExpManagerConfig
from nemologger.lightning_port import callbacks

# Everything that a section turns on by itself, but for the checkpoints.
OFF = {
    "create_tensorboard_logger": False,
    "create_preemption_callback": False,
    "log_step_timing": False,
    "disable_validation_on_resume": False,
    "log_tflops_per_sec_per_gpu": False,
}
NO_CKPT = {**OFF, "create_checkpoint_callback": False}
NO_FILE = {"save_nemo_on_train_end": False}


def bare_trainer(**options: Any):
    """A trainer as exp_manager wants it."""
    return quiet_trainer(**{"enable_checkpointing": False, "max_steps": 10, **options})


def ckpt(**params: Any) -> dict[str, Any]:
    """A section with nothing but checkpoints."""
    return {**OFF, "checkpoint_callback_params": {**NO_FILE, **params}}


def fit(trainer, model: ToyModel | None = None) -> ToyModel:
    """Train."""
    model = ToyModel() if model is None else model
    trainer.fit(model, datamodule=ToyDataModule())
    return model


def one_of(trainer, kind: type | str):
    """The trainer's callback of that class, or class's name; None without one."""
    found = [c for c in callbacks(trainer) if (type(c).__name__ == kind if isinstance(kind, str) else type(c) is kind)]
    assert len(found) < 2
    return found[0] if found else None


def checkpoints(run: Path) -> list[str]:
    """What is in the checkpoints directory of a run, hidden files left out."""
    directory = run / "checkpoints"
    found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    return [name for name in found if not name.startswith(".")]


def all_keys() -> list[str]:
    """Every field, nested ones as ``"ema.decay"``."""
    keys: list[str] = []
    for one in fields(ExpManagerConfig):
        nested = NESTED.get(one.name)
        keys += [one.name] if nested is None else [f"{one.name}.{inner.name}" for inner in fields(nested)]
    return keys
