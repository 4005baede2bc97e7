"""What a list, dictionary, array or tensor holds: whether it has changed, as plain types, and back in its place."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import deque
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash

from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.state.plain import can_be_written
from nemologger.checkpoint.state.stage import can_be_filled

KINDS = (list, tuple, dict, set, frozenset, deque, bytearray, np.ndarray, np.generic, torch.Tensor)

#: No more than this is kept of a dataset or sampler.
MOST_BYTES = 16 * 2**20
#: What is longer is looked at in so many places.
_MOST_ITEMS = 2**18
_MOST_OBJECTS = 2**15
_MOST_LOOKED_AT = 2**26
_SMALL = 2**16
#: Of a batch this many items, of each as many numbers or letters, and no deeper.
_FEW, _DEEPEST = 1024, 6

#: Numbers of a list that is not longer take less as they are than in an array.
_SHORT = 64

#: What each of many arrays takes beside its numbers, in the checkpoint and until it is there.
_ARRAY = 1024

_TEXTS = (str, bytes, type(None))
_NUMBERS = (int, float, bool)
_SCALARS = (*_NUMBERS, *_TEXTS)
_OF_SCALARS = frozenset(_SCALARS)
_NUMERIC = (np.ndarray, np.generic, torch.Tensor)


class CannotBeKeptError(Exception):
    """It is no plain data, or too much of it; says which."""


# --- change -----------------------------------------------------------------------------------------------------------


def is_small(value: Any) -> bool:
    """Whether to look at ``value`` takes microseconds."""
    return _nbytes(value) <= _SMALL if issubclass(type(value), _NUMERIC) else length(value) <= 1024


def length(value: Any) -> int:
    """How many items are in it; very many if it does not say."""
    try:
        return len(value)
    except Exception:  # noqa: BLE001  it is of a class of somebody's
        return sys.maxsize


def is_in_memory(value: Any) -> bool:
    """Whether ``value`` is an array or tensor that has the same fingerprint in every process, if it holds the same."""
    if issubclass(type(value), torch.Tensor):
        return _is_plain(value) and value.device.type == "cpu"
    return type(value) is np.ndarray and not value.dtype.hasobject


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
    if isinstance(value, torch.Tensor) and _is_plain(value) and value.device.type == "cpu":
        flat = value.detach().reshape(-1) if value.is_contiguous() else value.detach()[:1].reshape(-1)
        _add_array(digest, _bytes_of(flat[:: 1 + flat.numel() // _FEW]))
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _add_array(digest, np.ascontiguousarray(value.flat[:_FEW]))
    elif isinstance(value, _SCALARS):
        digest.update(repr(value[:_FEW] if isinstance(value, str | bytes) else value).encode())
    elif depth < _DEEPEST and isinstance(value, dict | list | tuple):
        for item in islice(value.values() if isinstance(value, dict) else value, _FEW):
            if left[0] <= 0:
                return
            _add_batch(digest, item, depth + 1, left)
    elif depth < _DEEPEST and hasattr(value, "__dict__"):
        _add_batch(digest, vars(value), depth + 1, left)


def _nbytes(value: Any) -> int:
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
    if not _is_plain(tensor) or (tensor.device.type != "cpu" and _nbytes(tensor) > _SMALL):
        version = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001
        digest.update(f"{id(tensor)} {version}".encode())
        return
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    _add_array(digest, _bytes_of(tensor), share)


def _is_plain(tensor: torch.Tensor) -> bool:
    special = tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta"
    plain = tensor.layout is torch.strided and type(tensor) in (torch.Tensor, torch.nn.Parameter) and not special
    return plain and can_be_written(tensor.dtype)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _add_items(digest: Any, value: Any, share: int) -> None:
    digest.update(str(len(value)).encode())
    step = 1 + len(value) * share // _MOST_ITEMS
    items: Any = dict.items(value) if isinstance(value, dict) else value
    listed = items[::step] if isinstance(items, list | tuple) else list(islice(items, 0, None, step))
    kinds = set(map(type, (item for _, item in listed) if isinstance(value, dict) else listed))
    if not (kinds <= set(_SCALARS) or _are_numbers(kinds)):
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
    if not isinstance(value, dict) and not any(issubclass(kind, (*_SCALARS, *KINDS)) for kind in kinds):
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


class _Streaming(pickle.Pickler):
    """Never read again: a way to go through nested lists and dictionaries at the speed of C."""

    def reducer_override(self, value: Any) -> Any:
        if value is int:
            return NotImplemented
        kind = type(value)  # isinstance() would ask a proxy what it stands for
        if issubclass(kind, np.generic):
            return int, (value.item(),)
        if issubclass(kind, np.ndarray | torch.Tensor):
            return int, (fingerprint(value) if is_small(value) else id(value),)
        if issubclass(kind, dict):
            return int, (list(dict.items(value)),)
        return int, (list(value) if issubclass(kind, deque | bytearray) else id(value),)


# --- keep -------------------------------------------------------------------------------------------------------------


def keep(value: Any, left: list[int]) -> Any:
    """``value`` as plain types.

    Args:
        value: One of :data:`KINDS`.
        left: How many bytes it may take; less those that it takes, afterwards.

    Raises:
        CannotBeKeptError: It holds objects, or too much.
    """
    mine = list(left)
    try:
        with without_collector():
            kept = _kept(value, mine)
    except CannotBeKeptError:
        raise
    except Exception as error:  # it holds itself, for one
        raise CannotBeKeptError(f"cannot be gone through ({type(error).__name__})") from error
    left[:] = mine
    return kept


def keep_changed(value: Any, left: list[int], first: Any) -> Any:
    """As :func:`keep`, and notes which entries of a dictionary are those of ``first``, and which it has lost: a later
    program may give others, and more.

    Args:
        value: One of :data:`KINDS`.
        left: As there.
        first: What :func:`keep` returned for it at first; None if it did not.
    """
    kept = keep(value, left)
    if type(value) is dict and first is not None and is_small(value):
        before = unkept(first)
        kept["dict"]["gone"] = [key for key in before if type(key) is str and key not in value]
        kept["dict"]["given"] = [
            key
            for key, item in value.items()
            if type(key) is str
            and type(item) in _SCALARS
            and type(before.get(key)) is type(item)
            and before[key] == item
        ]
    return kept


def copied(value: Any, known: dict[int, Any] | None = None) -> Any:
    """What ``copy.deepcopy`` returns, ten times as fast for long lists of numbers and texts.

    Args:
        value: Anything.
        known: What has been copied already, by the ``id`` of what it was: what is shared stays shared.
    """
    known = {} if known is None else known
    kind = type(value)
    if kind in _SCALARS:
        return value
    if id(value) in known:
        return known[id(value)]
    made: Any
    if kind is dict:
        made = known[id(value)] = {}
        made.update((key, copied(item, known)) for key, item in value.items())
        return made
    if kind is list:
        made = known[id(value)] = []
        made += value if _OF_SCALARS.issuperset(map(type, value)) else [copied(item, known) for item in value]
        return made
    return copy.deepcopy(value, known)


def _kept(value: Any, left: list[int]) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        _pay(left, len(value) + 8 if kind in (str, bytes) else 8)
        return value
    if issubclass(kind, np.ndarray | np.generic):
        array = np.ascontiguousarray(value)
        if array.dtype.hasobject or array.dtype.names or not (issubclass(kind, np.generic) or kind is np.ndarray):
            raise CannotBeKeptError(f"is a {kind.__name__} of {array.dtype}")
        _pay(left, array.nbytes)
        parts = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
        shape = list(np.shape(value)) if issubclass(kind, np.ndarray) else None
        return {"array": parts, "dtype": array.dtype.str, "shape": shape}
    if issubclass(kind, torch.Tensor):
        if not _is_plain(value):
            raise CannotBeKeptError("is a nested tensor" if value.is_nested else f"is a special {kind.__name__}")
        _pay(left, _nbytes(value))
        return {"tensor": value.detach().cpu().clone()}
    if kind in (list, tuple, set, frozenset, deque):
        return {kind.__name__: _kept_items(value, left)}
    if issubclass(kind, dict):
        return {"dict": {"keys": _kept_items(dict.keys(value), left), "values": _kept_items(dict.values(value), left)}}
    if kind is bytearray:
        _pay(left, len(value))
        return {"bytearray": bytes(value)}
    raise CannotBeKeptError(f"holds {kind.__name__} objects")


def _kept_items(value: Any, left: list[int]) -> Any:
    if 8 * len(value) > left[0]:
        _pay(left, 8 * len(value))
    kinds = set(map(type, value))
    if kinds <= _OF_SCALARS and (len(value) < _SHORT or not kinds <= {int, float}):
        _pay(left, 8 * len(value) + sum(len(item) for item in value if type(item) in (str, bytes)))
        return [*value]
    if kinds in ({int}, {float}) or (len(kinds) == 1 and issubclass(next(iter(kinds)), np.number)):
        _pay(left, 8 * len(value))
        array = np.array(list(value))
        if array.dtype.kind in "iuf":
            return {"packed": _kept(array, [array.nbytes]), "python": bool(kinds & {int, float})}
    if len(value) > _FEW and any(issubclass(kind, np.ndarray | torch.Tensor) for kind in kinds):
        _pay(left, _ARRAY * len(value))
    return [_kept(item, left) for item in value]


def _pay(left: list[int], count: int) -> None:
    left[0] -= count
    if left[0] < 0:
        raise CannotBeKeptError("is too large")


def unkept(plain: Any) -> Any:
    """What :func:`keep` was given."""
    if not isinstance(plain, dict):
        return plain
    if "array" in plain:
        array = np.frombuffer(plain["array"].cpu().numpy().tobytes(), dtype=plain["dtype"]).copy()
        return array[0] if plain["shape"] is None else array.reshape(plain["shape"])
    ((name, inner),) = plain.items()
    if name == "tensor":
        return inner.clone()
    if name == "bytearray":
        return bytearray(inner)
    if name == "dict":
        if isinstance(inner, list):  # as it was written before
            return {unkept(key): unkept(item) for key, item in inner}
        return dict(zip(_items(inner["keys"]), _items(inner["values"]), strict=True))
    items = _items(inner)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}[name](items)


def _items(inner: Any) -> list[Any]:
    if not isinstance(inner, dict):
        return [unkept(item) for item in inner]
    array = unkept(inner["packed"])
    return array.tolist() if inner["python"] else list(array)


def put_back(present: Any, plain: Any, *, same: bool, exactly: bool = True) -> Any:
    """What is to be in the place of ``present``, for ``plain`` of :func:`keep`.

    Args:
        present: What is there now.
        plain: What is to be there.
        same: Fill ``present`` itself, where possible: others may hold it too. Otherwise make another one like it.
        exactly: Also entries of a dictionary that had not changed. Otherwise they, and new ones, are what it gives today.
    """
    value = unkept(plain)
    if not exactly and isinstance(value, dict) and isinstance(present, dict):
        noted = plain["dict"] if isinstance(plain["dict"], dict) and "given" in plain["dict"] else None
        given, known = (set(noted["given"]), {*value, *noted["gone"]}) if noted else (set(), {*dict.keys(present)})
        value |= {k: v for k, v in dict.items(present) if type(k) is str and (k in given or k not in known)}
    return fill(present, value, same=same)


def fill(present: Any, value: Any, *, same: bool) -> Any:
    """What is to be in the place of ``present``, to hold what ``value`` does; see :func:`put_back`."""
    if isinstance(present, np.ndarray | torch.Tensor):
        fits = type(value) is type(present) and value.shape == present.shape and value.dtype == present.dtype
        fillable = can_be_filled(present) if isinstance(present, torch.Tensor) else present.flags.writeable
        if not (same and fits and fillable):
            return value.to(present.device) if isinstance(present, torch.Tensor) and hasattr(value, "to") else value
        if isinstance(present, torch.Tensor):
            with torch.no_grad():
                present.copy_(value)
        else:
            present[...] = value
        return present
    kind = next((kind for kind in (list, bytearray, dict, set, deque) if isinstance(present, kind)), None)
    if kind is None or not isinstance(value, kind):
        return value
    filled = present if same else copy.copy(present)
    filled.clear()
    filled.update(value) if isinstance(value, dict | set) else filled.extend(value)
    return filled
