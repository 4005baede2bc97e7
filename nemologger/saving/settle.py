"""The ModelCheckpoint of a run: its place among the trainer's callbacks, its directory, its names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from nemologger import lightning_port
from nemologger.errors import ConfigurationError
from nemologger.run.directory import RunDirectory

if TYPE_CHECKING:
    import lightning.pytorch as pl

# What each of them was given, and not by its maker: the next run that it serves gives it anew.
_given: WeakKeyDictionary[ModelCheckpoint, dict[str, Any]] = WeakKeyDictionary()


def place(trainer: pl.Trainer, ckpt: ModelCheckpoint | None) -> tuple[list[Callback], list[str]]:
    """The trainer's callbacks with ``ckpt`` among them, and warnings; the trainer is not changed.

    It takes the place of the first ModelCheckpoint. That is worth a warning unless it is the one that Lightning adds by
    itself.
    """
    callbacks = list(lightning_port.callbacks(trainer))
    if ckpt is None or any(callback is ckpt for callback in callbacks):
        return callbacks, []
    first = next((i for i, callback in enumerate(callbacks) if isinstance(callback, ModelCheckpoint)), None)
    if first is None:
        return [*callbacks, ckpt], []
    going = callbacks[first]
    callbacks[first] = ckpt
    if _is_default(going):
        return callbacks, []
    return callbacks, [
        f"the trainer's {type(going).__name__}(monitor={getattr(going, 'monitor', None)!r}) is replaced by the "
        f"{type(ckpt).__name__}(monitor={ckpt.monitor!r}) of NeMoLogger(ckpt=...)"
    ]


def settle(callbacks: Sequence[Callback], run: RunDirectory) -> None:
    """Give every ModelCheckpoint without a ``dirpath`` or ``filename`` the run's."""
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        given = _given[callback] = {}
        if callback.dirpath is None:
            given["dirpath"] = str(run.checkpoint_dir)
        if callback.filename is None:
            given |= _naming(callback, run.name)
        for name, value in given.items():
            setattr(callback, name, value)


def unsettle(callback: ModelCheckpoint, run: RunDirectory) -> None:
    """Take back what :func:`settle` gave ``callback`` for an earlier trainer, so that it can serve ``run``.

    Raises:
        ConfigurationError: It has saved checkpoints in another directory: it would compare with them, and remove them.
    """
    given = _given.pop(callback, {})
    has_saved = bool(callback.best_model_path or callback.last_model_path)
    if has_saved and "dirpath" in given and callback.dirpath == given["dirpath"] != str(run.checkpoint_dir):
        _given[callback] = given
        raise ConfigurationError(
            f"the {type(callback).__name__} in NeMoLogger(ckpt=...) keeps the checkpoints in {callback.dirpath}, which "
            f"another trainer made, and this run's are to be in {run.checkpoint_dir}: give every run a ModelCheckpoint of "
            "its own."
        )
    for name, value in given.items():
        if getattr(callback, name) == value:
            setattr(callback, name, True if name == "auto_insert_metric_name" else None)


def _naming(callback: ModelCheckpoint, name: str) -> dict[str, Any]:
    """How ``callback`` is to name the checkpoints of the run ``name``."""
    prefix = f"{name}--" if name else ""
    monitor = callback.monitor
    if monitor is None or set(monitor) & set("{}:[]!"):  # it cannot stand in a template
        return {"filename": prefix + "{epoch}-{step}"}
    filename = f"{prefix}{{{monitor}:.4f}}-{{epoch}}-{{step}}"
    if "/" in monitor:
        metrics = {key: torch.tensor(0) for key in (monitor, "epoch", "step")}
        path = callback.format_checkpoint_name(metrics, filename)
        if os.path.dirname(path) != (callback.dirpath or ""):
            # Lightning would write "val/loss=" into the name and so make a directory of it.
            shown = monitor.replace("/", "_")
            filename = f"{prefix}{shown}={{{monitor}:.4f}}-epoch={{epoch}}-step={{step}}"
            return {"filename": filename, "auto_insert_metric_name": False}
    return {"filename": filename}


def _is_default(callback: Callback) -> bool:
    """Whether it is no other than the one that a Trainer makes when it is given none."""
    default = ModelCheckpoint()
    return (
        type(callback) is ModelCheckpoint
        and callback.state_key == default.state_key
        and all(
            getattr(callback, name) == getattr(default, name)
            for name in ("dirpath", "filename", "save_top_k", "save_last", "save_weights_only")
        )
    )
