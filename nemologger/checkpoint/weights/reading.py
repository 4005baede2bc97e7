"""What torch raises over bytes that are not what they should be, as errors that name the file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from torch.distributed.checkpoint.api import CheckpointException

from nemologger.errors import DamagedCheckpointError, NemologgerError, RefusedError
from nemologger.stores.path import is_unknown

# What torch raises over bytes that are not what they should be.
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    MemoryError,
    OverflowError,
)


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what torch raises into errors that name ``path``."""
    try:
        yield
    except NemologgerError:
        raise
    except CheckpointException as failed:  # derives from BaseException
        first = next(iter(failed.failures.values()))[0]
        if isinstance(first, NemologgerError):
            raise first from failed
        raise DamagedCheckpointError(f"{path} cannot be read: {type(first).__name__}: {first}") from failed
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error):
            raise RefusedError(f"{path} holds more than plain types and was not loaded: {error}") from error
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    except _UNREADABLE as error:
        if isinstance(error, OSError) and is_unknown(cast(Path, path), error):
            raise
        raise DamagedCheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def is_local(file: object) -> bool:
    """Whether ``file`` names a file of the directory itself."""
    return isinstance(file, str) and file not in ("", ".", "..") and "/" not in file
