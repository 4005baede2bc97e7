"""The arguments of any object: captured ones, else the hyperparameters that Lightning keeps for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import torch
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

from nemologger.context import configs
from nemologger.context.record import captured
from nemologger.context.uncaptured import Uncaptured, class_of, type_name

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# Constructors that are declared to take anything, and do nothing with it.
_TAKE_NOTHING = (torch.nn.Module.__init__, pl.LightningModule.__init__, pl.LightningDataModule.__init__)


def config_of(instance: object) -> Any | None:
    """The ``fdl.Config`` that would make ``instance`` again, or None if nobody kept its arguments.

    In this order: what ``IOMixin`` or ``track_io`` captured; what ``save_hyperparameters`` kept as it was when the object
    was made, where a required argument it left out becomes an :class:`Uncaptured`; for a module, data module or callback
    whose constructor takes no arguments, its class alone.

    Example:
        >>> import torch
        >>> config_of(torch.nn.Linear(2, 2)) is None
        True
    """
    if isinstance(instance, fdl.Buildable):
        return instance
    if isinstance(instance, type):
        return None
    capture = captured(instance)
    if capture is not None:
        return capture.config
    assigned = getattr(instance, "__dict__", {}).get("__io__")
    if isinstance(assigned, fdl.Buildable):
        return assigned
    if isinstance(instance, HyperparametersMixin) and instance.hparams:
        return _from_hyperparameters(instance)
    if isinstance(instance, (torch.nn.Module, pl.LightningDataModule, pl.Callback)) and not _parameters(instance):
        return configs.make(fdl.Config, class_of(instance), {})
    return None


def why_not(instance: object) -> str:
    """Why :func:`config_of` knows nothing of ``instance``, and what would change that."""
    capture = captured(instance)
    if capture is not None and capture.error:
        return capture.error
    if isinstance(instance, pl.Trainer):
        return "Lightning's Trainer does not keep its arguments; use nemologger.Trainer, which takes the same"
    if isinstance(instance, (torch.Tensor, float, int, str)) or not hasattr(instance, "__dict__"):
        return "a value of this type or size cannot be written as JSON"
    keeps = isinstance(instance, HyperparametersMixin)
    kept = ", or call self.save_hyperparameters() in it, without ignore=" if keeps else ""
    return (
        "its constructor arguments were not captured; let its class inherit nemologger.io.IOMixin, or call "
        f"nemologger.io.track_io({class_of(instance).__qualname__}) before making it{kept}"
    )


def _parameters(instance: object) -> dict[str, inspect.Parameter]:
    if type(instance).__init__ in _TAKE_NOTHING:
        return {}
    try:
        return dict(configs.signature_of(class_of(instance)).parameters)
    except (TypeError, ValueError):  # a class written in C that does not tell
        return {"?": inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)}


def _from_hyperparameters(instance: HyperparametersMixin) -> Any | None:
    kept: Mapping[Any, Any] = instance.hparams_initial
    parameters = _parameters(instance)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind not in _VARIADIC}
    arguments: configs.Arguments = {
        name: kept[name] for name in kept if isinstance(name, str) and (name in named or takes_any)
    }
    missing = [
        name for name, parameter in named.items() if name not in arguments and parameter.default is parameter.empty
    ]
    if not arguments and missing:
        return None  # hyperparameters of another kind, such as one namespace
    reason = f"save_hyperparameters of {type_name(instance)} left it out"
    arguments.update({name: configs.config(Uncaptured, f"the argument {name!r}", reason) for name in missing})
    return configs.make(fdl.Config, class_of(instance), arguments)
