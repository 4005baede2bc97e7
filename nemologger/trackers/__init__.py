"""Experiment trackers that write to the run directory, and go on where the resumed run does.

They are loggers of Lightning's: for ``NeMoLogger(extra_loggers=[...])`` or ``Trainer(logger=[...])``. TensorBoard and W&B
are Lightning's own, in ``NeMoLogger(tensorboard=..., wandb=...)``. Importing a name loads no tracker's package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemologger.trackers.clearml import ClearMLLogger as ClearMLLogger
    from nemologger.trackers.comet import CometLogger as CometLogger
    from nemologger.trackers.continued_steps import ContinuedSteps as ContinuedSteps
    from nemologger.trackers.csv_logger import CSVLogger as CSVLogger
    from nemologger.trackers.dllogger import DLLogger as DLLogger
    from nemologger.trackers.mlflow import MLFlowLogger as MLFlowLogger
    from nemologger.trackers.neptune import NeptuneLogger as NeptuneLogger

_HOME_OF = {
    "ClearMLLogger": "clearml",
    "CometLogger": "comet",
    "ContinuedSteps": "continued_steps",
    "CSVLogger": "csv_logger",
    "DLLogger": "dllogger",
    "MLFlowLogger": "mlflow",
    "NeptuneLogger": "neptune",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import what was asked for."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__
