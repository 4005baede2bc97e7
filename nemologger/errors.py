"""Every error this package raises.

    NemologgerError
    ├── ConfigurationError      (ValueError)         an argument, or two that contradict each other
    │   ├── LoggerMisconfigurationError              exp_manager and the trainer both have a logger
    │   └── CheckpointMisconfigurationError          exp_manager and the trainer both have a checkpoint callback
    ├── NotFoundError           (FileNotFoundError)  no checkpoint, run or file where one was asked for
    ├── CheckpointError         (RuntimeError)
    │   ├── UnfinishedCheckpointError  (ValueError)  it was being written or removed when its process died
    │   ├── DamagedCheckpointError                   its bytes are not the ones that were written
    │   ├── SaveFailedError     (OSError)            it could not be written; the one before it is untouched
    │   └── ModelMismatchError                       it belongs to a model with other parameters
    ├── DirectoryInUseError     (BlockingIOError)    another live run writes there
    ├── RunCompletedError       (ValueError)         the run has ended and was not asked to go on
    ├── ContextError            (ValueError)         a context that cannot be written or read
    ├── RefusedError            (PermissionError)    loading it would run code that nobody allowed
    ├── RankError               (RuntimeError)       another rank failed
    │   └── SilentRankError     (TimeoutError)       it did not answer in time: it has died, or hangs
    └── SweepError              (RuntimeError)       combinations of a sweep failed

Each is also the builtin that a caller would catch. All take one message, so that they travel between ranks by value.
"""

from __future__ import annotations


class NemologgerError(Exception):
    """The base of every error this package raises."""


class ConfigurationError(NemologgerError, ValueError):
    """An argument has a value that cannot work, or contradicts another one."""


class LoggerMisconfigurationError(ConfigurationError):
    """The trainer has a logger, and ``exp_manager`` is told to make one or to choose its directory."""


class CheckpointMisconfigurationError(ConfigurationError):
    """The trainer has a checkpoint callback, and ``exp_manager`` is told to make one."""


class NotFoundError(NemologgerError, FileNotFoundError):
    """There is no checkpoint, run or file where one was asked for."""


class CheckpointError(NemologgerError, RuntimeError):
    """A checkpoint cannot be written or read."""


class UnfinishedCheckpointError(CheckpointError, ValueError):
    """A checkpoint was being written or removed when its process died."""


class DamagedCheckpointError(CheckpointError):
    """The bytes of a checkpoint are not the ones that were written."""


class SaveFailedError(CheckpointError, OSError):
    """A checkpoint could not be written. The one before it is untouched."""


class ModelMismatchError(CheckpointError):
    """A checkpoint belongs to a model with other parameters."""


class DirectoryInUseError(NemologgerError, BlockingIOError):
    """Another live run writes to the directory."""


class RunCompletedError(NemologgerError, ValueError):
    """The run has ended and was not asked to go on."""


class ContextError(NemologgerError, ValueError):
    """A context cannot be written or read."""


class RefusedError(NemologgerError, PermissionError):
    """Loading this would run code that nobody allowed."""


class RankError(NemologgerError, RuntimeError):
    """Another rank failed."""


class SilentRankError(RankError, TimeoutError):
    """Another rank did not answer in time. The ranks cannot agree on anything any more."""


class SweepError(NemologgerError, RuntimeError):
    """Combinations of a sweep failed. The others have run."""
