"""What a list, dictionary, array or tensor holds, or another value that is no number or text: whether it has changed."""

from __future__ import annotations

import pickle
import sys
from array import array
from collections import deque
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash

from nemologger.checkpoint.state.plain import can_be_written
from nemologger.exact.values import atoms

KINDS: tuple[type, ...] = (
    list, tuple, dict, set, frozenset, deque, bytearray, np.ndarray, np.generic, torch.Tensor, bytes, *atoms.KINDS,
)  # fmt: skip

#: What is longer is looked at in so many places.
_MOST_ITEMS = 2**18
_MOST_OBJECTS = 2**15
_MOST_LOOKED_AT = 2**26
_SMALL = 2**16
#: Of a batch this many items, of each as many numbers or letters, and no deeper.
_FEW, _DEEPEST = 1024, 6
#: Within a list or dictionary so many large arrays and tensors are looked into.
_MOST_LARGE = 256

_TEXTS = (str, bytes, type(None))
_NUMBERS = (int, float, bool)
SCALARS = (*_NUMBERS, *_TEXTS)
_NUMERIC = (np.ndarray, np.generic, torch.Tensor)
_RAW = (bytes, bytearray, array)


def is_content(value: Any) -> bool:
    """Whether it is one of :data:`KINDS`, a fraction, or a number or text of a class of somebody's."""
    return issubclass(type(value), KINDS) or atoms.is_atom(value)


def is_small(value: Any) -> bool:
    """Whether to look at ``value`` takes microseconds."""
    if issubclass(type(value), _NUMERIC):
        return nbytes(value) <= _SMALL
    return length(value) <= 1024 or (atoms.is_atom(value) and type(value) is not array)


def length(value: Any) -> int:
    """How many items are in it; very many if it does not say."""
    try:
        return len(value)
    except Exception:  # noqa: BLE001  it is of a class of somebody's
        return sys.maxsize


def is_in_memory(value: Any) -> bool:
    """Whether ``value`` is an array or tensor that has the same fingerprint in every process, if it holds the same."""
    if issubclass(type(value), torch.Tensor):
        return is_plain(value) and value.device.type == "cpu"
    return type(value) is np.ndarray and not value.dtype.hasobject


def are_only_numbers(value: Any) -> bool:
    """Whether ``value`` is an array or tensor in memory that nobody has a gradient of, or a list or tuple of numbers."""
    if issubclass(type(value), torch.Tensor | np.ndarray):
        return is_in_memory(value) and not getattr(value, "requires_grad", False)
    return type(value) in (list, tuple) and _are_numbers(set(map(type, value)))


def fingerprint(value: Any, share: int = 1) -> int:
    """A number that is another one when ``value``, one of :data:`KINDS`, holds something else.

    That takes some 5 ms for 100 MB in an array, and at most some 50 ms for a list or dictionary. Of more than 64 MB or a
    quarter of a million items (32,768 objects, which count by their identity) not every one is looked at: that they were
    shuffled, filled or replaced shows, that one among millions was set may not.

    Args:
        value: What to look at.
        share: Take one part in so many of that time.
    """
    digest = xxhash.xxh3_64(type(value).__name__.encode())
    try:
        if isinstance(value, torch.Tensor):
            _add_tensor(digest, value, share)
        elif isinstance(value, np.ndarray | np.generic) and not np.asarray(value).dtype.hasobject:
            _add_array(digest, np.asarray(value) if type(value) is not np.memmap else value, share)
        elif type(value) in _RAW:
            _add_array(digest, np.frombuffer(value, np.uint8), share)
        elif atoms.is_atom(value):
            digest.update(repr(atoms.sign_of(value)).encode())
        else:
            _add_items(digest, value.ravel().tolist() if isinstance(value, np.ndarray) else value, share)
    except Exception:  # noqa: BLE001  a class of somebody's that does not let others go through it
        digest.update(str(id(value)).encode())
    return digest.intdigest()


def of_batch(batch: Any) -> int:
    """A number that is the same in every process for a batch that holds the same, as far as a short look goes."""
    digest = xxhash.xxh3_64()
    _add_batch(digest, batch, 0, [_FEW])
    return digest.intdigest() >> 1


def _add_batch(digest: Any, value: Any, depth: int, left: list[int]) -> None:
    left[0] -= 1
    digest.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor) and is_plain(value) and value.device.type == "cpu":
        flat = value.detach().reshape(-1) if value.is_contiguous() else value.detach()[:1].reshape(-1)
        _add_array(digest, bytes_of(flat[:: 1 + flat.numel() // _FEW]))
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _add_array(digest, np.ascontiguousarray(value.flat[:_FEW]))
    elif isinstance(value, SCALARS):
        digest.update(repr(value[:_FEW] if isinstance(value, str | bytes) else value).encode())
    elif depth < _DEEPEST and isinstance(value, dict | list | tuple):
        for item in islice(value.values() if isinstance(value, dict) else value, _FEW):
            if left[0] <= 0:
                return
            _add_batch(digest, item, depth + 1, left)
    elif depth < _DEEPEST and hasattr(value, "__dict__"):
        _add_batch(digest, vars(value), depth + 1, left)


def nbytes(value: Any) -> int:
    """What an array or tensor takes."""
    return int(value.numel() * value.element_size() if isinstance(value, torch.Tensor) else value.nbytes)


def _add_array(digest: Any, array: np.ndarray, share: int = 1) -> None:
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    if isinstance(array, np.memmap):
        digest.update(str(id(array)).encode())  # it is the file's content, which is no part of a run's state
        return
    flat = array.reshape(-1)
    flat = flat[:: max(1, array.nbytes * share // _MOST_LOOKED_AT)]
    digest.update(np.ascontiguousarray(flat).view(np.uint8))


def _add_tensor(digest: Any, tensor: torch.Tensor, share: int) -> None:
    if not is_plain(tensor) or (tensor.device.type != "cpu" and nbytes(tensor) > _SMALL):
        version = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001
        digest.update(f"{id(tensor)} {version}".encode())
        return
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    _add_array(digest, bytes_of(tensor), share)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is its numbers, and nothing else."""
    special = tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta"
    plain = tensor.layout is torch.strided and type(tensor) in (torch.Tensor, torch.nn.Parameter) and not special
    return plain and can_be_written(tensor.dtype)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The numbers of a plain tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _add_items(digest: Any, value: Any, share: int) -> None:
    digest.update(str(len(value)).encode())
    step = 1 + len(value) * share // _MOST_ITEMS
    items: Any = dict.items(value) if isinstance(value, dict) else value
    listed = items[::step] if isinstance(items, list | tuple) else list(islice(items, 0, None, step))
    kinds = set(map(type, (item for _, item in listed) if isinstance(value, dict) else listed))
    if not (kinds <= set(SCALARS) or _are_numbers(kinds)):
        listed = listed[:: 1 + len(listed) * share // _MOST_OBJECTS]
        within = sum(len(item) for item in listed if issubclass(type(item), list | tuple))
        if within * share > _MOST_ITEMS:
            digest.update(str(within).encode())
            step = 1 + within * share // _MOST_ITEMS
            listed = [item[::step] if issubclass(type(item), list | tuple) else item for item in listed]
    if _are_numbers(kinds) and not isinstance(value, dict):
        array = np.asarray(listed)
        if not array.dtype.hasobject:
            _add_array(digest, array)
            return
    if not isinstance(value, dict) and not any(issubclass(kind, (*SCALARS, *KINDS)) for kind in kinds):
        _add_array(digest, np.fromiter(map(id, listed), np.int64, len(listed)))  # objects: they count by their identity
        return
    pickler = _Streaming(_Sink(digest), protocol=5)
    pickler.fast = True  # by value, whether or not two items are the same object
    try:
        pickler.dump(listed)
    except (ValueError, RecursionError):  # it holds itself
        digest.update(str([id(item) for item in listed]).encode())


def _are_numbers(kinds: set[type]) -> bool:
    return all(kind in _NUMBERS or issubclass(kind, np.number | np.bool_) for kind in kinds)


class _Sink:
    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def write(self, part: Any) -> int:
        self._digest.update(part)
        return len(part)


def _numbers_of(value: Any) -> Any:
    """What a small array or tensor holds; to make a fingerprint of each of thousands would take several times as long."""
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, torch.Tensor) and is_plain(value) and value.device.type == "cpu":
        return str(value.dtype), tuple(value.shape), bytes_of(value).tobytes()
    return fingerprint(value)


def _some_of(value: Any) -> Any:
    """Some of the numbers of a large array or tensor."""
    if is_in_memory(value) and type(value) is np.ndarray:
        return value.flat[:: 1 + value.size // _FEW].tobytes()
    if isinstance(value, torch.Tensor) and is_in_memory(value) and value.is_contiguous():
        return bytes_of(value.detach().view(-1)[:: 1 + value.numel() // _FEW]).tobytes()
    return None


class _Streaming(pickle.Pickler):
    """Never read again: a way to go through nested lists and dictionaries at the speed of C."""

    _large_left = _MOST_LARGE

    def _of_large(self, value: Any) -> Any:
        """Which it is, and for the first ones some numbers: what is changed in place changes nearly all of them."""
        self._large_left -= 1
        return id(value), _some_of(value) if self._large_left >= 0 else None

    def reducer_override(self, value: Any) -> Any:
        if value is int:
            return NotImplemented
        kind = type(value)  # isinstance() would ask a proxy what it stands for
        if issubclass(kind, np.generic):
            return int, (value.item(),)
        if issubclass(kind, np.ndarray | torch.Tensor):
            return int, (_numbers_of(value) if is_small(value) else self._of_large(value),)
        if issubclass(kind, dict):
            return int, (list(dict.items(value)),)
        if (parts := atoms.parts_of(value)) is not None:
            return int, (parts,)
        return int, (list(value) if issubclass(kind, deque | bytearray) else id(value),)
