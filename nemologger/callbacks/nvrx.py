"""NVIDIA's resiliency extension, where a user wants it instead of ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from nemologger.errors import ConfigurationError
from nemologger.lightning_port import callbacks, set_callbacks

if TYPE_CHECKING:
    import lightning.pytorch as pl

_MODULE = "nvidia_resiliency_ext.ptl_resiliency"
# What ft_launcher tells its ranks: where the monitor of this one listens.
_MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
# What the script that starts a job again and again tells it: the file that says that it is finished.
_FINISHED = "FAULT_TOL_FINISHED_FLAG_FILE"


def is_launched() -> bool:
    """Whether this process was started by the extension's ``ft_launcher``."""
    return _MONITOR in os.environ


def callback_class(name: str) -> Callable[..., Callback]:
    """The extension's callback ``name``.

    Raises:
        ConfigurationError: If the extension is not installed, or cannot be imported.
    """
    try:
        return getattr(import_module(_MODULE), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"use_nvrx=True needs {_MODULE}.{name} ({error}): pip install nvidia-resiliency-ext, or leave use_nvrx out"
        ) from error


def check_launch(*, simulated_fault: Any, max_subsequent_job_failures: int) -> None:
    """Say now what the extension would say less clearly, in the middle of its setup.

    Raises:
        ConfigurationError: If the process was not started as the extension's fault tolerance needs it.
    """
    if not is_launched():
        raise ConfigurationError(
            f"FaultTolerance(use_nvrx=True): this process was not started by ft_launcher ({_MONITOR} is not in its "
            "environment), so there is no monitor to report to. Start the run with 'ft_launcher --nproc-per-node=... "
            "--max-restarts=... SCRIPT', or leave use_nvrx out"
        )
    if max_subsequent_job_failures and not os.environ.get(_FINISHED):
        raise ConfigurationError(
            f"FaultTolerance(max_subsequent_job_failures={max_subsequent_job_failures!r}): {_FINISHED} is not in the "
            "environment. Let it name a file: that is made when training is complete, and whoever starts the job again can "
            "look for it"
        )
    if simulated_fault and not torch.cuda.is_available():
        raise ConfigurationError(
            f"FaultTolerance(simulated_fault={simulated_fault!r}): nvidia-resiliency-ext agrees over CUDA on the rank that "
            "is to fail, and there is no CUDA device. Leave simulated_fault out, and stop a rank by hand: kill -STOP PID"
        )


def attach(trainer: pl.Trainer, pl_module: pl.LightningModule, make: Callable[[], Any], kind: str) -> None:
    """Give ``trainer`` the extension's callback, for use in a callback's ``setup``.

    Args:
        trainer: The trainer. If it has one from an earlier fit, that is set up by Lightning.
        pl_module: Its model.
        make: Makes the callback.
        kind: Its class's name.

    Raises:
        ConfigurationError: If the callback cannot be made or set up.
    """
    if any(isinstance(callback, callback_class(kind)) for callback in callbacks(trainer)):  # type: ignore[arg-type]
        return
    try:
        callback = make()
        callback.setup(trainer, pl_module, "fit")
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        raise ConfigurationError(
            f"use_nvrx=True: the {kind} of nvidia-resiliency-ext cannot be used here: {type(error).__name__}: {error}"
        ) from error
    set_callbacks(trainer, [*callbacks(trainer), callback])
