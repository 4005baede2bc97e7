"""Python values, written with what fiddle's JSON can hold: configs, plain containers, plain values and names."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import pathlib
import sys
import types
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import fiddle as fdl
import torch
from fiddle import tagging
from fiddle.experimental import serialization

from nemologger.context import configs, rebuild
from nemologger.context.configs import step
from nemologger.context.hparams import config_of, why_not
from nemologger.context.references import FUNCTIONS, TORCH_CONSTANTS, is_reference_like, reference_to
from nemologger.context.snapshot import snapshot
from nemologger.context.uncaptured import Uncaptured, type_name

# A longer list is data, not an argument: writing it at every checkpoint would cost seconds and megabytes.
MAX_ITEMS = 10_000
_MAX_TENSOR = 1_000

_SCALARS = (bool, int, float, str, bytes, type(None))
_BUILDABLES = (fdl.Config, fdl.Partial, fdl.ArgFactory)


class _Lost(Exception):
    """A value that cannot be written, and why."""


@dataclass
class Writable:
    """Converts the values of one context.

    Attributes:
        losses: What could not be converted, as messages that begin with the path of the value.
    """

    losses: list[str] = field(default_factory=list)
    _done: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)

    def convert(self, value: Any, path: str = "") -> Any:
        """``value`` as fiddle can write it. What cannot be written becomes a config of :class:`Uncaptured`.

        Objects that were shared stay shared.
        """
        kind = type(value)
        if kind in _SCALARS:
            return value
        if id(value) in self._done:
            return self._done[id(value)][1]
        try:
            if id(value) in self._open:
                raise _Lost("it contains itself")
            self._open.add(id(value))
            try:
                converted = self._convert(value, path)
            finally:
                self._open.discard(id(value))
        except Exception as error:  # noqa: BLE001  one value that cannot be read must not cost the others
            reason = (
                str(error) if isinstance(error, _Lost) else f"it could not be read: {type(error).__name__}: {error}"
            )
            what = _what(value)
            self.losses.append(f"{path or 'the object itself'} ({what}): {reason}")
            return configs.config(Uncaptured, what, reason)
        self._done[id(value)] = (value, converted)  # with the value, lest its id is used again
        return converted

    def _convert(self, value: Any, path: str) -> Any:
        if isinstance(value, fdl.Buildable):
            return self._buildable(value, path)
        if is_reference_like(value):
            return self._named(value)
        config = config_of(value)
        if config is not None:
            return self._buildable(config, path)
        kind = type(value)
        if kind in (list, tuple):
            return kind(self._items(value, len(value), path))
        if kind in (set, frozenset):
            return self._set(value, path)
        if kind in (dict, collections.defaultdict):
            return self._dict(value, path)
        if kind is slice:
            return slice(*(self.convert(getattr(value, n), step(path, n)) for n in ("start", "stop", "step")))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            self._importable(kind)
            return kind._make(
                self.convert(item, step(path, name)) for name, item in zip(kind._fields, value, strict=True)
            )
        for known, call in _CALLS:
            if isinstance(value, known) and (kind is known or known in _WITH_SUBCLASSES):
                return self._call(call(value), path)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if kind.__module__ == "numpy":
            return self._numpy(value, path)
        if kind.__module__.startswith("omegaconf."):
            return self._omegaconf(value, path)
        taken = snapshot(value)
        if isinstance(taken, fdl.Buildable):  # a dataclass instance or a partial that was put somewhere later
            return self._buildable(taken, path)
        base: Any
        for base in (dict, list, tuple, set, str, int, float):
            if isinstance(value, base):  # a subclass, made again from what it is based on
                return self._call((kind, (base(value),), {}), path)
        raise _Lost(why_not(value))

    def _buildable(self, value: Any, path: str) -> Any:
        if type(value) not in _BUILDABLES:
            if isinstance(value, tagging.TaggedValueCls) and "value" in configs.arguments(value):
                return self.convert(configs.arguments(value)["value"], path)
            raise _Lost("only fdl.Config, fdl.Partial and fdl.ArgFactory are written")
        target = self._importable(value.__fn_or_cls__)
        arguments = configs.arguments(value)
        return configs.make(type(value), target, {k: self.convert(v, step(path, k)) for k, v in arguments.items()})

    def _call(self, call: tuple[Any, tuple[Any, ...], dict[str, Any]], path: str) -> Any:
        target, args, kwargs = call
        return self._buildable(configs.config(target, *args, **kwargs), path)

    def _named(self, value: Any) -> Any:
        if isinstance(value, enum.Flag) and reference_to(value) is None:  # several members together
            return self._call((type(value), (value.value,), {}), "")
        if isinstance(value, (*TORCH_CONSTANTS, types.BuiltinFunctionType)):
            if reference_to(value) is None:
                raise _Lost("a function written in C is kept only if it is one of torch's")
            return value
        if isinstance(value, type) and rebuild.PLAIN_TYPES.get(value.__name__) is value:
            return configs.config(rebuild.plain_type, value.__name__)  # fiddle's reader refuses these by name
        return self._importable(value)

    def _importable(self, value: Any) -> Any:
        of_python = getattr(value, "__module__", None) in sys.builtin_module_names
        if of_python and not (isinstance(value, type) and serialization.find_node_traverser(value)):
            raise _Lost(f"fiddle does not write what belongs to Python's own module {value.__module__}")
        if reference_to(value) is not None:
            return value
        wrapped = getattr(value, "__wrapped__", None)  # what track_io(function) was given
        if isinstance(value, FUNCTIONS) and wrapped is not None and reference_to(wrapped) is not None:
            return wrapped
        name = getattr(value, "__qualname__", repr(value))
        raise _Lost(
            f"{name} cannot be found by its name: it is a lambda, is defined inside a function or the script of another "
            "process (Ray), or another object took its name (a cell was run again: make the object again, too); give it a "
            "name of its own at the top of a module"
        )

    def _items(self, items: Iterable[Any], size: int, path: str) -> list[Any]:
        if size > MAX_ITEMS:
            raise _Lost(
                f"it has {size} items, more than the {MAX_ITEMS} that a context keeps; give a path to them instead"
            )
        return [self.convert(item, step(path, index)) for index, item in enumerate(items)]

    def _set(self, value: Any, path: str) -> Any:
        # Sorted by type and text: the same set is written the same way by every process.
        items = self._items(sorted(value, key=lambda item: (type_name(item), repr(item))), len(value), path)
        if any(isinstance(item, fdl.Buildable) for item in items):
            return configs.config(type(value), items)
        return type(value)(items)

    def _dict(self, value: Any, path: str) -> Any:
        if len(value) > MAX_ITEMS:
            raise _Lost(f"it has {len(value)} items, more than the {MAX_ITEMS} that a context keeps")
        pairs = [(self.convert(k, f"{path}.keys()"), self.convert(v, step(path, k))) for k, v in value.items()]
        if any(not _plain_key(key) for key, _ in pairs):
            return configs.config(type(value), [list(pair) for pair in pairs])
        if isinstance(value, collections.defaultdict):
            factory = value.default_factory
            return collections.defaultdict(None if factory is None else self._importable(factory), pairs)
        return dict(pairs)

    def _tensor(self, value: torch.Tensor) -> Any:
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.numel() > _MAX_TENSOR:
            raise _Lost(f"only plain tensors of at most {_MAX_TENSOR} values are written; give a path to larger data")
        if value.is_complex() or value.is_meta:
            raise _Lost("complex tensors and tensors without values are not written")
        data = value.detach().flatten().tolist()
        return configs.config(rebuild.tensor, data, value.dtype, list(value.shape))

    def _numpy(self, value: Any, path: str) -> Any:
        if not hasattr(value, "dtype") or value.dtype.kind not in "biuf" or value.size > _MAX_TENSOR:
            raise _Lost(f"only numpy arrays of at most {_MAX_TENSOR} numbers are written; give a path to larger data")
        if value.ndim == 0 and type(value).__name__ != "ndarray":
            return value.item()
        return configs.config(rebuild.array, value.flatten().tolist(), str(value.dtype), list(value.shape))

    def _omegaconf(self, value: Any, path: str) -> Any:
        from omegaconf import OmegaConf  # the value is one of its own, so it is there

        container = OmegaConf.to_container(value, resolve=False)
        return configs.config(rebuild.omegaconf, self.convert(container, path))


def _what(value: Any) -> str:
    """What a lost value is: its class, and for a config that of the object it would make."""
    if isinstance(value, fdl.Buildable):
        target = value.__fn_or_cls__
        return f"{target.__module__}.{target.__qualname__}" if hasattr(target, "__qualname__") else repr(target)
    return type_name(value)


def _plain_key(key: Any) -> bool:
    if type(key) is tuple:
        return all(_plain_key(item) for item in key)
    return type(key) in _SCALARS or is_reference_like(key)


_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _datetime(value: datetime.datetime) -> _Call:
    parts = (value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond)
    return datetime.datetime, parts, {"tzinfo": value.tzinfo} if value.tzinfo else {}


# How to make a value again. pathlib.Path rather than its class here, which depends on the machine.
_CALLS: list[tuple[type, Callable[[Any], _Call]]] = [
    (pathlib.Path, lambda v: (pathlib.Path, (str(v),), {})),
    (pathlib.PurePath, lambda v: (type(v), (str(v),), {})),
    (
        datetime.timedelta,
        lambda v: (type(v), (), {"days": v.days, "seconds": v.seconds, "microseconds": v.microseconds}),
    ),
    (datetime.datetime, _datetime),
    (datetime.date, lambda v: (type(v), (v.year, v.month, v.day), {})),
    (datetime.timezone, lambda v: (type(v), (v.utcoffset(None),), {})),
    (decimal.Decimal, lambda v: (type(v), (str(v),), {})),
    (fractions.Fraction, lambda v: (type(v), (v.numerator, v.denominator), {})),
    (uuid.UUID, lambda v: (type(v), (str(v),), {})),
    (complex, lambda v: (rebuild.number, (v.real, v.imag), {})),
    (bytearray, lambda v: (rebuild.mutable_bytes, (bytes(v),), {})),
    (range, lambda v: (rebuild.interval, (v.start, v.stop, v.step), {})),
    (torch.Size, lambda v: (torch.Size, (list(v),), {})),
    (torch.device, lambda v: (torch.device, (str(v),), {})),
    (argparse.Namespace, lambda v: (type(v), (), vars(v))),
    (types.SimpleNamespace, lambda v: (type(v), (), vars(v))),
    (collections.OrderedDict, lambda v: (type(v), ([list(pair) for pair in v.items()],), {})),
    (collections.Counter, lambda v: (type(v), (dict(v),), {})),
    (collections.deque, lambda v: (type(v), (list(v), v.maxlen), {})),
]
_WITH_SUBCLASSES = {pathlib.Path, pathlib.PurePath}
