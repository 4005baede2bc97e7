"""NeMo 1's ``exp_manager``: a run set up from a section of a YAML file, by one call.

It only translates: what a section stands for is made of the objects that can be used without it.
"""

from nemologger.errors import (
    CheckpointMisconfigurationError,
    LoggerMisconfigurationError,
    NotFoundError,
    RunCompletedError,
)
from nemologger.exp_manager.clean import clean_exp_ckpt
from nemologger.exp_manager.config import (
    CallbackParams,
    ClearMLParams,
    DLLoggerParams,
    EarlyStoppingParams,
    EMAParams,
    ExpManagerConfig,
    FaultToleranceParams,
    IPLEpochStopperParams,
    MLFlowParams,
    StepTimingParams,
    StragglerDetectionParams,
)
from nemologger.exp_manager.setup import exp_manager

__all__ = [
    "CallbackParams",
    "CheckpointMisconfigurationError",
    "ClearMLParams",
    "DLLoggerParams",
    "EMAParams",
    "EarlyStoppingParams",
    "ExpManagerConfig",
    "FaultToleranceParams",
    "IPLEpochStopperParams",
    "LoggerMisconfigurationError",
    "MLFlowParams",
    "NotFoundError",
    "RunCompletedError",
    "StepTimingParams",
    "StragglerDetectionParams",
    "clean_exp_ckpt",
    "exp_manager",
]
