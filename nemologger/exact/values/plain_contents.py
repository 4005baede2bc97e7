"""What a list, dictionary, array or tensor holds, as plain types, and back in its place."""

from __future__ import annotations

import copy
import sys
from array import array
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.state.plain import name_of_named_tuple, named_tuple
from nemologger.checkpoint.state.stage import can_be_filled
from nemologger.exact.values import atoms, contents, mappings
from nemologger.exact.values.contents import SCALARS
from nemologger.exact.values.rows import CannotBeKeptError as CannotBeKeptError
from nemologger.exact.values.rows import from_rows, rows_of
from nemologger.exact.values.tensors import leaves

#: No more than this is kept of a dataset or sampler.
MOST_BYTES = 16 * 2**20
#: A list that is longer, of other things than numbers and texts, is kept as one row of bytes.
_MANY = 64
#: Numbers of a list that is not longer take less as they are than in an array.
_SHORT = 64
_OF_SCALARS = frozenset(SCALARS)


def keep(value: Any, left: list[int], *, filled: bool = True) -> Any:
    """``value`` as plain types.

    Args:
        value: One of :data:`~nemologger.exact.values.contents.KINDS`.
        left: How many bytes it may take; less those that it takes, afterwards.
        filled: A dictionary will be there to be filled with it, of whichever class it is.

    Raises:
        CannotBeKeptError: It holds objects, or too much.
    """
    mine = list(left)
    try:
        with without_collector():
            kept = _kept(value, mine, outermost=filled)
    except CannotBeKeptError:
        raise
    except Exception as error:  # it holds itself, for one
        raise CannotBeKeptError(f"cannot be gone through ({type(error).__name__})") from error
    left[:] = mine
    return kept


def keep_state(state: Any, left: list[int]) -> Any:
    """As :func:`keep`, for a state dictionary of tensors: that they are too large is said before any of them is copied."""
    if bytes_of_tensors(state) > left[0]:
        raise CannotBeKeptError("is too large")
    return keep(state, left)


def bytes_of_tensors(state: Any) -> int:
    """What the tensors of a state dictionary take."""
    tensors = (leaf for leaf in leaves(state) if isinstance(leaf, torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors if contents.is_plain(tensor))


def keep_changed(value: Any, left: list[int], first: Any) -> Any:
    """As :func:`keep`, and notes which entries of a dictionary are those of ``first``, and which it has lost: a later
    program may give others, and more.

    Args:
        value: One of :data:`~nemologger.exact.values.contents.KINDS`.
        left: As there.
        first: What :func:`keep` returned for it at first; None if it did not.
    """
    kept = keep(value, left)
    if type(value) is dict and first is not None and contents.is_small(value):
        before = unkept(first)
        kept["dict"]["gone"] = [key for key in before if type(key) is str and key not in value]
        kept["dict"]["given"] = [
            key
            for key, item in value.items()
            if type(key) is str
            and key in before
            and type(item) in SCALARS
            and type(before[key]) is type(item)
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
    if kind in SCALARS:
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
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):  # its class may want other arguments
        return tuple.__new__(kind, [copied(item, known) for item in value])
    return copy.deepcopy(value, known)


def _kept(value: Any, left: list[int], *, outermost: bool = False) -> Any:
    kind = type(value)
    if kind in SCALARS:
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
        if not contents.is_plain(value):
            raise CannotBeKeptError("is a nested tensor" if value.is_nested else f"is a special {kind.__name__}")
        _pay(left, contents.nbytes(value))
        return {"tensor": value.detach().cpu().clone()}
    if kind is deque and value.maxlen is not None:
        return {"queue": {"items": _kept_items(value, left), "most": value.maxlen}}
    if kind in (list, tuple, set, frozenset, deque):
        return {kind.__name__: _kept_items(value, left)}
    if issubclass(kind, dict):
        name = mappings.name_of(value)
        if name is None and not outermost:  # which is filled as it is there
            raise CannotBeKeptError(f"holds {kind.__name__} objects")
        if any(issubclass(sort, torch.Tensor) for sort in set(map(type, dict.keys(value)))):
            raise CannotBeKeptError("has tensors for keys, which are found by their identity")
        kept = {"keys": _kept_items(dict.keys(value), left), "values": _kept_items(dict.values(value), left)}
        return {"dict": kept | ({} if name in (None, "dict") else {"kind": name})}
    if kind is bytearray:
        _pay(left, len(value))
        return {"bytearray": bytes(value)}
    if (atom := atoms.parts_of(value)) is not None:
        _pay(left, sum(map(sys.getsizeof, atom)))
        return {"atom": atom}
    if (named := name_of_named_tuple(kind)) is not None:
        return {"named": {"class": named, "items": _kept_items(value, left)}}
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
    if len(value) > _MANY and kinds == {torch.Tensor} and _are_alike(value):
        _pay(left, len(value) * (contents.nbytes(next(iter(value))) + 8))
        return {"stacked": torch.stack([*value]).detach().cpu()}
    if len(value) > _MANY:
        rows = rows_of([*value], left[0])
        _pay(left, rows.numel())
        return {"rows": rows}
    return [_kept(item, left) for item in value]


def _are_alike(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether they are rows of one tensor, as losses of one step each are: one by one they would take a save seconds."""
    sorts = {(tensor.dtype, tensor.layout, tensor.device, tensor.shape) for tensor in tensors}
    return len(sorts) == 1 and contents.is_plain(next(iter(tensors)))


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
    if name == "atom":
        return atoms.made_of(inner)
    if name == "dict":
        if isinstance(inner, list):  # as it was written before
            return {unkept(key): unkept(item) for key, item in inner}
        return mappings.of_name(
            inner.get("kind", "dict"), zip(_items(inner["keys"]), _items(inner["values"]), strict=True)
        )
    if name == "named":
        return named_tuple(inner["class"], _items(inner["items"]))
    if name == "queue":
        return deque(_items(inner["items"]), inner["most"])
    items = _items(inner)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}[name](items)


def _items(inner: Any) -> list[Any]:
    if not isinstance(inner, dict):
        return [unkept(item) for item in inner]
    if "rows" in inner:
        return from_rows(inner["rows"])
    if "stacked" in inner:
        return [tensor.clone() for tensor in inner["stacked"].unbind()]
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
    if type(present) is array and type(value) is array and present.typecode == value.typecode:
        row = present if same else copy.copy(present)
        row[:] = value
        return row
    kind = next((kind for kind in (list, bytearray, dict, set, deque) if isinstance(present, kind)), None)
    if kind is None or not isinstance(value, kind):
        return value
    filled = present if same else copy.copy(present)
    filled.clear()
    filled.update(value) if isinstance(value, dict | set) else filled.extend(value)
    return filled
