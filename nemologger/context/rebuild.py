"""Plain functions that a context calls for the values JSON and Python's own constructors cannot express."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

PLAIN_TYPES: dict[str, type] = {kind.__name__: kind for kind in (int, float, bool, str, complex, object, type(None))}


def number(real: float, imag: float) -> complex:
    """A complex number."""
    return complex(real, imag)


def interval(start: int, stop: int, step: int) -> range:
    """A ``range``."""
    return range(start, stop, step)


def mutable_bytes(data: bytes) -> bytearray:
    """A ``bytearray``."""
    return bytearray(data)


def plain_type(name: str) -> type:
    """One of Python's own types for plain values, by its name."""
    return PLAIN_TYPES[name]


def tensor(data: list[Any], dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """A small tensor on the CPU, from its values in row-major order."""
    return torch.tensor(data, dtype=dtype).reshape(shape)


def array(data: list[Any], dtype: str, shape: list[int]) -> Any:
    """A small numpy array of numbers or truth values."""
    return np.array(data, dtype=np.dtype(dtype)).reshape(shape)


def omegaconf(container: Any) -> Any:
    """An OmegaConf configuration, with its interpolations as they were written."""
    from omegaconf import OmegaConf  # only where somebody used it

    return OmegaConf.create(container)


FUNCTIONS = (number, interval, mutable_bytes, plain_type, tensor, array, omegaconf)
