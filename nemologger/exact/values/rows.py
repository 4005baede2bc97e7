"""Long lists of small things, a buffer of samples say, as one row of bytes: one by one they would take a save seconds."""

from __future__ import annotations

import io
import pickle
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import torch

from nemologger.checkpoint.state.plain import name_of_named_tuple, named_tuple
from nemologger.errors import RefusedError
from nemologger.exact.values import atoms, mappings
from nemologger.exact.values.contents import bytes_of, is_plain


class CannotBeKeptError(Exception):
    """It is no plain data, or too much of it; says which."""


def rows_of(items: list[Any], most: int) -> torch.Tensor:
    """``items``, which hold numbers, texts, arrays, tensors, and lists and dictionaries of them, for :func:`from_rows`.

    Raises:
        CannotBeKeptError: They hold something else, or take more than ``most`` bytes.
    """
    file = _Limited(most)
    _Writer(file, protocol=5).dump(items)
    return torch.from_numpy(np.frombuffer(file.getvalue(), np.uint8).copy())


def from_rows(rows: torch.Tensor) -> list[Any]:
    """What :func:`rows_of` was given. Runs no code of it.

    Raises:
        RefusedError: It names something else.
    """
    items: list[Any] = _Reader(io.BytesIO(rows.cpu().numpy().tobytes())).load()
    return items


def _array(dtype: str, shape: tuple[int, ...], content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype).reshape(shape).copy()


def _number(dtype: str, content: bytes) -> Any:
    return np.frombuffer(content, dtype)[0]


def _tensor(dtype: str, shape: tuple[int, ...], content: bytes) -> torch.Tensor:
    kind = vars(torch).get(dtype)
    if not isinstance(kind, torch.dtype):
        raise RefusedError(f"a list in the checkpoint names a dtype {dtype!r}: it was not loaded")
    made = torch.empty(shape, dtype=kind, device="cpu")  # wherever the program has others made
    bytes_of(made)[:] = np.frombuffer(content, np.uint8)
    return made


def _dictionary(kind: str, items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    return mappings.of_name(kind, items)


def _named(kind: str, items: list[Any]) -> Any:
    return named_tuple(kind, items)


def _atom(parts: list[Any]) -> Any:
    return atoms.made_of(parts)


_FUNCTIONS = (_array, _number, _tensor, _dictionary, _named, _atom, deque, dict)
_MADE_BY = {made_by.__name__: made_by for made_by in _FUNCTIONS}


class _Limited(io.BytesIO):
    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def write(self, part: Any) -> int:
        self._left -= len(part)
        if self._left < 0:
            raise CannotBeKeptError("is too large")
        return super().write(part)


class _Writer(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """How to write what is no plain list, tuple, set, number or text."""
        if any(value is made_by for made_by in _MADE_BY.values()):
            return NotImplemented
        kind = type(value)  # isinstance() would ask a proxy what it stands for
        if issubclass(kind, torch.Tensor):
            if not is_plain(value):
                raise CannotBeKeptError(f"holds {kind.__name__} objects of a special kind")
            return _tensor, (str(value.dtype).removeprefix("torch."), tuple(value.shape), bytes_of(value).tobytes())
        numbers = issubclass(kind, np.ndarray | np.generic) and not (value.dtype.hasobject or value.dtype.names)
        if numbers and kind is np.ndarray:
            return _array, (value.dtype.str, value.shape, value.tobytes())
        if numbers and issubclass(kind, np.generic):
            return _number, (value.dtype.str, value.tobytes())
        if kind is deque:
            return deque, (list(value), value.maxlen)
        name = mappings.name_of(value) if issubclass(kind, dict) else None
        if name is not None:
            return _dictionary, (name, list(dict.items(value)))
        if (name := name_of_named_tuple(kind)) is not None:
            return _named, (name, list(value))
        if (parts := atoms.parts_of(value)) is not None:
            return _atom, (parts,)
        raise CannotBeKeptError(f"holds {kind.__name__} objects")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What ``name`` stands for, one of ours: whose attributes the row may set is made for it alone."""
        if name not in _MADE_BY:
            raise RefusedError(f"a list in the checkpoint names {module}.{name}, which none needs: it was not loaded")
        return partial(_MADE_BY[name])
