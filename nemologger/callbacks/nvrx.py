"""NVIDIA's resiliency extension, where a user wants it instead of ours."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger.errors import ConfigurationError
from nemologger.lightning_port import callbacks

if TYPE_CHECKING:
    import lightning.pytorch as pl

_MODULE = "nvidia_resiliency_ext.ptl_resiliency"


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


def attach(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: Any) -> None:
    """Give ``trainer`` another callback, for use in a callback's ``setup``."""
    # Another list: Lightning is iterating over this one.
    trainer.callbacks = [*callbacks(trainer), callback]  # type: ignore[attr-defined]  # set by Lightning's connector
    callback.setup(trainer, pl_module, "fit")
