"""Any state as plain types, and back: what ``common.pt`` holds.

``torch.load(weights_only=True)`` reads tensors, numbers, strings, lists, tuples and dictionaries, and nothing else. State
dictionaries hold more: paths, timedeltas, enums, dataclasses, numpy arrays, config objects. Each becomes a dictionary
tagged with :data:`TAG`; :func:`decode` turns it back. What cannot be put into plain types is left out, and named; where
the program has the very object, its place there is kept, and :func:`fill_in` puts the object of a later start there.

Many bytes in a row are a tensor of bytes there: the pickle protocol that torch uses has them as text, in twice the space,
slowly, and no more than 4 GB of them.

Classes are only looked up in modules that the program has already imported: decoding imports nothing (contract C8).
"""

from __future__ import annotations

import dataclasses
import io
import sys
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import date, datetime, timedelta
from enum import Enum, Flag
from functools import cache
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

TAG = "__nemologger__"
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_MANY = 4096  # bytes; a tensor has a record of its own in the file


class Encoder:
    """Turns values into plain types.

    Args:
        place: Where the program has an object, if it does.

    Attributes:
        left_out: ``path -> why`` of every value that has no plain form.
        places: The paths of those that the program has, and where.
    """

    def __init__(self, place: Callable[[Any], tuple[str | int, ...] | None] = lambda value: None) -> None:
        self.left_out: dict[str, str] = {}
        self.places: dict[str, tuple[str | int, ...]] = {}
        self._place = place
        self._inside: set[int] = set()

    def encode(self, value: Any, path: str = "") -> Any:
        """The plain form of ``value``; ``path`` names it in :attr:`left_out`."""
        if type(value) is bytes and not value:
            return {TAG: "no bytes"}  # torch.save writes a call of bytes() for it, which weights_only refuses
        if type(value) is bytes and len(value) >= _MANY:
            return {TAG: "bytes", "value": _tensor_of(value)}
        if type(value) in _ATOMS:
            return value
        if id(value) in self._inside:
            return self._leave_out(value, path, "refers to itself")
        self._inside.add(id(value))
        try:
            return self._compound(value, path)
        finally:
            self._inside.remove(id(value))

    def _compound(self, value: Any, path: str) -> Any:
        if issubclass(type(value), torch.Tensor):  # isinstance() would ask a proxy what it stands for
            return self._tensor(value, path)
        if type(value) is list:
            return [self.encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
        if type(value) is tuple:
            return tuple(self.encode(item, f"{path}[{i}]") for i, item in enumerate(value))
        if type(value) is dict:
            return self._mapping(value, path)
        return self._tagged(value, path)

    def _leave_out(self, value: Any, path: str, why: str = "has no plain form") -> dict[str, Any]:
        name = _class_of(value)
        self.left_out[path or "<root>"] = f"a {name} {why}"
        place = self._place(value)
        if place is None:
            return {TAG: "left out", "class": name}
        self.places[path or "<root>"] = place
        return {TAG: "left out", "class": name, "place": list(place)}

    def _tensor(self, tensor: torch.Tensor, path: str) -> Any:
        if tensor.device.type == "meta" or is_made_of_others(tensor):
            return self._leave_out(
                tensor, path, "has no values" if tensor.device.type == "meta" else "has no plain form"
            )
        if not can_be_written(tensor.dtype):
            return self._leave_out(tensor, path, f"of {tensor.dtype} cannot be written by torch.save")
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor:
            tensor = tensor.as_subclass(torch.Tensor)
        # A view would drag its whole storage into the file.
        whole = tensor.layout != torch.strided or tensor.untyped_storage().nbytes() == tensor.nbytes
        return (tensor if whole else tensor.clone()).cpu()

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        if TAG not in value and all(type(key) in (str, int, float, bool, type(None)) for key in value):
            return {key: self.encode(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        pairs = [
            (self.encode(key, f"{path} key {name}"), self.encode(item, f"{path}[{name}]"))
            for name, (key, item) in zip(map(_text_of, value), value.items(), strict=True)
        ]
        return {TAG: "dict", "items": pairs}

    def _tagged(self, value: Any, path: str) -> Any:
        known = type(value)
        for kind, types, encode in _KINDS:
            if issubclass(known, types):
                plain = encode(value)
                return {TAG: kind, "value": self.encode(plain, path)}
        if issubclass(known, Enum):
            # A combination of flags has no name.
            member = value.value if issubclass(known, Flag) else value.name
            return {TAG: "enum", "class": _name_of(type(value)), "name": member}
        if dataclasses.is_dataclass(known) and not issubclass(known, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
            return {TAG: "dataclass", "class": _name_of(type(value)), "value": self.encode(fields, path)}
        numpy = sys.modules.get("numpy")
        if numpy is not None and issubclass(known, numpy.generic | numpy.ndarray):
            return self._numpy(value, path)
        omegaconf = sys.modules.get("omegaconf")
        if omegaconf is not None and issubclass(known, omegaconf.Container):
            container = omegaconf.OmegaConf.to_container(value, resolve=False)
            return {TAG: "omegaconf", "value": self.encode(container, path)}
        if issubclass(known, type) or callable(value):
            name = _name_of(value)
            if name is not None and _decode_name(name) is value:
                return {TAG: "name", "value": name}
        if issubclass(known, tuple) and hasattr(value, "_fields"):
            return {TAG: "namedtuple", "class": _name_of(type(value)), "value": self.encode(tuple(value), path)}
        base: Any
        for base in (int, float, str, bytes, list, tuple):  # subclasses of plain types
            if issubclass(known, base):
                return self.encode(base(value), path)
        if issubclass(known, Mapping):
            return self._mapping(value, path)
        return self._leave_out(value, path)

    def _numpy(self, value: Any, path: str) -> Any:
        if value.dtype.kind == "V" and not value.dtype.names:  # a dtype of somebody's own, or raw memory
            return self._leave_out(value, path)
        if value.dtype.hasobject:
            return {TAG: "numpy objects", "value": self.encode(value.tolist(), path)}
        kind = "numpy array" if isinstance(value, np.ndarray) else "numpy scalar"
        dtype = value.dtype.str
        if value.dtype.names:
            try:
                dtype = np.lib.format.dtype_to_descr(value.dtype)
            except ValueError:  # its fields overlap, or are in another order in memory
                from numpy.lib.recfunctions import repack_fields  # brings all of numpy.ma along

                return self._numpy(repack_fields(value, recurse=True), path)
        many = kind == "numpy array" and value.nbytes >= _MANY
        data = _tensor_of(np.ascontiguousarray(value)) if many else value.tobytes() or ""
        return {TAG: kind, "dtype": dtype, "shape": tuple(value.shape), "data": data}


def is_made_of_others(value: Any) -> bool:
    """Whether ``value`` is a tensor that has no values of its own: quantized by torchao, sharded, or yet to come."""
    return is_traceable_wrapper_subclass(value)


@cache
def can_be_written(dtype: torch.dtype) -> bool:
    """Whether ``torch.save`` knows ``dtype``: it does not those of one to seven bits, as ``torch.uint4``."""
    with suppress(RuntimeError):  # quantized: torch makes none without a scale, and writes those that there are
        try:
            torch.save(torch.empty(0, dtype=dtype), io.BytesIO())
        except KeyError:
            return False
    return True


def _tensor_of(data: Any) -> torch.Tensor:
    """A copy of the bytes of a contiguous buffer."""
    row = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    return torch.from_numpy(row.copy())


def fill_in(value: Any, there: Callable[[Any], Any]) -> tuple[Any, list[str]]:
    """The plain form ``value``, for :func:`decode`, with objects of this program where it had them when it was saved.

    Args:
        value: A plain form.
        there: What this program has in such a place now; None if nothing.

    Returns:
        The plain form, and the paths of what is still missing.
    """
    if not isinstance(value, dict | list | tuple):
        return value, []
    if isinstance(value, dict) and value.get(TAG) == "left out":
        found = there(value["place"]) if "place" in value else None
        fits = found is not None and _class_of(found) == value.get("class")
        return ({TAG: "of the program", "value": found}, []) if fits else (value, [""])
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = {key: fill_in(item, there) for key, item in items}
    missing = [f"{key}.{name}" if name else str(key) for key, (_, names) in parts.items() for name in names]
    filled = [part for part, _ in parts.values()]
    return (dict(zip(parts, filled, strict=True)) if isinstance(value, dict) else type(value)(filled)), missing


def without_left_out(state: dict[str, Any]) -> dict[str, Any]:
    """The plain form ``state`` of an object, for one that keeps what it has of what is not in its state."""
    return {
        key: value for key, value in state.items() if not (isinstance(value, dict) and value.get(TAG) == "left out")
    }


def _text_of(key: Any) -> str:
    """``key`` in a path."""
    try:
        return repr(key)
    except Exception:  # noqa: BLE001  nothing is to be said of it
        return f"<{type(key).__qualname__}>"


def _class_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def decode(value: Any) -> Any:
    """What :class:`Encoder` was given. A class that this program does not know leaves its plain value."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if type(value) is tuple:
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: decode(item) for key, item in value.items()}
    return _decode_tagged(value)


def _decode_tagged(tagged: dict[str, Any]) -> Any:
    kind = tagged[TAG]
    if kind in _DECODERS:
        return _DECODERS[kind](decode(tagged["value"]))
    if kind in _TAGGED:
        return _TAGGED[kind](tagged)
    return None  # left out, or written by a newer version


def _decode_dict(value: dict[str, Any]) -> Any:
    return {_hashable(decode(key)): decode(item) for key, item in value["items"]}


def _decode_enum(value: dict[str, Any]) -> Any:
    known, name = _look_up(value["class"]), value["name"]
    if isinstance(known, type) and issubclass(known, Flag) and type(name) is int:
        return known(name)
    if isinstance(known, type) and issubclass(known, Enum):
        return known.__members__.get(name, name)
    return name


def _decode_dataclass(value: dict[str, Any]) -> Any:
    fields = decode(value["value"])
    known = _look_up(value["class"])
    if not (isinstance(known, type) and dataclasses.is_dataclass(known)):
        return fields
    # No constructor runs: what it computed is among the fields already. And nothing but fields is set: another name, say
    # __class__, may do things.
    instance = object.__new__(known)
    for field in dataclasses.fields(known):
        if field.name in fields:
            object.__setattr__(instance, field.name, fields[field.name])
    return instance


def named_tuple(name: str | None, items: Iterable[Any]) -> Any:
    """One of the class ``name``, or a plain tuple if this program does not know it. No code of it runs."""
    known = _look_up(name)
    is_one = isinstance(known, type) and issubclass(known, tuple) and hasattr(known, "_fields")
    return tuple.__new__(known if is_one else tuple, items)


def name_of_named_tuple(kind: type) -> str | None:
    """A name of the class for :func:`named_tuple`; None if it is none, or not to be found by its name."""
    return name_of_class(kind) if issubclass(kind, tuple) and hasattr(kind, "_fields") else None


def scalar_of_class(name: str, value: Any) -> Any:
    """``value`` as one of the class ``name``, or as it is if this program does not know it. No code of it runs.

    Raises:
        TypeError: It is none of the plain numbers and texts.
    """
    base, known = type(value), _look_up(name)
    if base not in (int, float, str):  # to make one of another base may do things, and so may what ends it
        raise TypeError(f"{name} is to be made of a {base.__name__}")
    return base.__new__(known, value) if isinstance(known, type) and issubclass(known, base) else value


def name_of_class(kind: type) -> str | None:
    """A name by which ``kind`` is found again in another process; None if there is none."""
    name = _name_of(kind)
    return name if _look_up(name) is kind else None


def _decode_omegaconf(plain: Any) -> Any:
    omegaconf = sys.modules.get("omegaconf")
    return plain if omegaconf is None else omegaconf.OmegaConf.create(plain)


def _decode_name(name: str) -> Any:
    # A function of the standard library is never part of a state, but may be somebody's way to run a command.
    known = _look_up(name)
    ours = name.partition(":")[0].partition(".")[0] not in sys.stdlib_module_names
    harmless = isinstance(known, type) or (ours and isinstance(known, FunctionType | BuiltinFunctionType))
    return known if harmless else name


def _decode_numpy(value: dict[str, Any]) -> Any:
    dtype = np.lib.format.descr_to_dtype(value["dtype"])
    data = value["data"]
    if isinstance(data, torch.Tensor):
        return data.numpy().view(dtype).reshape(value["shape"])
    # An empty array has no bytes, and text of no length takes none.
    array = np.frombuffer(data, dtype) if data and dtype.itemsize else np.zeros(value["shape"], dtype)
    array = array.reshape(value["shape"]).copy()
    return array[()] if value[TAG] == "numpy scalar" else array


def _name_of(value: Any) -> str | None:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return None if module is None or name is None or "<" in name else f"{module}:{name}"


def _look_up(name: str | None) -> Any:
    """The object called ``module:qualname``, if its module is there and it is defined in that very module."""
    module, _, qualname = (name or "").partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        # Not getattr: a module's own __getattr__ may import, a class's may do anything.
        found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
    return found if getattr(found, "__module__", None) == module else None


def _hashable(value: Any) -> Any:
    """``value`` as a key. One whose class this program does not know has become a dictionary or a list."""
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return tuple(_hashable(item) for item in value)
    return value


# kind, types, how to take it apart; the reverse is in _DECODERS. Order matters: datetime is a date.
_KINDS: list[tuple[str, type | tuple[type, ...], Callable[[Any], Any]]] = [
    ("path", PurePath, str),
    ("timedelta", timedelta, lambda value: (value.days, value.seconds, value.microseconds)),
    ("datetime", datetime, lambda value: value.isoformat()),
    ("date", date, lambda value: value.isoformat()),
    ("namespace", Namespace, vars),
    ("set", set, list),
    ("frozenset", frozenset, list),
    ("deque", deque, lambda value: (list(value), value.maxlen)),
    ("bytearray", bytearray, bytes),
    ("range", range, lambda value: (value.start, value.stop, value.step)),
    ("slice", slice, lambda value: (value.start, value.stop, value.step)),
    ("defaultdict", defaultdict, lambda value: (value.default_factory, list(value.items()))),
    ("ordered dict", OrderedDict, lambda value: list(value.items())),
    ("counter", Counter, dict),
]

_FACTORIES: tuple[Any, ...] = (None, bool, int, float, complex, str, list, tuple, dict, set)

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "path": Path,
    "timedelta": lambda value: timedelta(*value),
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "namespace": lambda value: Namespace(**value),
    "set": lambda value: set(map(_hashable, value)),
    "frozenset": lambda value: frozenset(map(_hashable, value)),
    "deque": lambda value: deque(value[0], value[1]),
    "bytearray": bytearray,
    "range": lambda value: range(*value),
    "slice": lambda value: slice(*value),
    "defaultdict": lambda value: defaultdict(value[0] if value[0] in _FACTORIES else None, _pairs(value[1])),
    "ordered dict": lambda value: OrderedDict(_pairs(value)),
    "counter": Counter,
    "numpy objects": lambda value: value,
    "omegaconf": _decode_omegaconf,
}

#: Those that take more than a decoded value, or one as it is.
_TAGGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": _decode_dict,
    "of the program": lambda tagged: tagged["value"],
    "no bytes": lambda tagged: b"",
    "bytes": lambda tagged: tagged["value"].numpy().tobytes(),
    "enum": _decode_enum,
    "dataclass": _decode_dataclass,
    "namedtuple": lambda tagged: named_tuple(tagged["class"], decode(tagged["value"])),
    "name": lambda tagged: _decode_name(tagged["value"]),
    "numpy scalar": _decode_numpy,
    "numpy array": _decode_numpy,
}


def _pairs(items: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    return [(_hashable(key), item) for key, item in items]
