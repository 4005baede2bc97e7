"""Callbacks that can be used alone in ``Trainer(callbacks=[...])``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemologger.callbacks.delta_timing import DeltaTimingCallback as DeltaTimingCallback
    from nemologger.callbacks.ema import EMA as EMA
    from nemologger.callbacks.export_model import ExportModel as ExportModel
    from nemologger.callbacks.fault_tolerance import FaultTolerance as FaultTolerance
    from nemologger.callbacks.flops import FLOPsMeasurement as FLOPsMeasurement
    from nemologger.callbacks.ipl_epoch_stopper import IPLEpochStopper as IPLEpochStopper
    from nemologger.callbacks.max_time import MaxTimePerRun as MaxTimePerRun
    from nemologger.callbacks.memory_profile import MemoryProfileCallback as MemoryProfileCallback
    from nemologger.callbacks.nsys import NsysCallback as NsysCallback
    from nemologger.callbacks.preemption import PreemptionCallback as PreemptionCallback
    from nemologger.callbacks.skip_validation import SkipValidationOnResume as SkipValidationOnResume
    from nemologger.callbacks.straggler_detection import StragglerDetection as StragglerDetection
    from nemologger.callbacks.timing import TimingCallback as TimingCallback

_HOME_OF = {
    "DeltaTimingCallback": "nemologger.callbacks.delta_timing",
    "EMA": "nemologger.callbacks.ema",
    "ExportModel": "nemologger.callbacks.export_model",
    "FLOPsMeasurement": "nemologger.callbacks.flops",
    "FaultTolerance": "nemologger.callbacks.fault_tolerance",
    "IPLEpochStopper": "nemologger.callbacks.ipl_epoch_stopper",
    "MaxTimePerRun": "nemologger.callbacks.max_time",
    "MemoryProfileCallback": "nemologger.callbacks.memory_profile",
    "NsysCallback": "nemologger.callbacks.nsys",
    "PreemptionCallback": "nemologger.callbacks.preemption",
    "SkipValidationOnResume": "nemologger.callbacks.skip_validation",
    "StragglerDetection": "nemologger.callbacks.straggler_detection",
    "TimingCallback": "nemologger.callbacks.timing",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import what was asked for."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nemologger.callbacks' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__
