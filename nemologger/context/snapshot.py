"""An argument as it was passed: what may change later is copied, what is large is not."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import inspect
import types
from typing import Any

import fiddle as fdl
import torch

from nemologger.context import configs
from nemologger.context.record import captured

Memo = dict[int, tuple[Any, Any]]

_SCALARS = (bool, int, float, complex, str, bytes, type(None))


def snapshot(value: Any, memo: Memo | None = None) -> Any:
    """``value`` as it is now.

    Objects with captured arguments, partials and dataclass instances become configs; plain containers and configs are
    copied. Tensors, modules and other objects are shared: they are what the caller holds anyway.
    """
    memo = {} if memo is None else memo
    if type(value) in _SCALARS:
        return value
    if id(value) not in memo:
        memo[id(value)] = (value, value)  # a container that holds itself ends here
        memo[id(value)] = (value, _take(value, memo))  # with the value, lest its id is used again
    return memo[id(value)][1]


def _take(value: Any, memo: Memo) -> Any:
    if isinstance(value, fdl.Buildable):
        return configs.copy(value)
    capture = captured(value)
    if capture is not None:
        return value if capture.config is None else _as_it_is_now(value, capture.config, memo)
    if isinstance(value, functools.partial):
        return _partial(value, memo)
    kind = type(value)
    if kind in (list, tuple):
        return value[:] if _flat(value) else kind(snapshot(item, memo) for item in value)
    if kind is dict:
        return dict(value) if _flat(value.values()) else {k: snapshot(v, memo) for k, v in value.items()}
    if kind in (set, frozenset):
        return kind(value)  # its elements cannot change, and a config could not be an element
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind._make(snapshot(item, memo) for item in value)
    if kind is collections.OrderedDict:
        return collections.OrderedDict((k, snapshot(v, memo)) for k, v in value.items())
    if kind is collections.defaultdict:
        return collections.defaultdict(value.default_factory, {k: snapshot(v, memo) for k, v in value.items()})
    if kind in (argparse.Namespace, types.SimpleNamespace):
        return kind(**{k: snapshot(v, memo) for k, v in vars(value).items()})
    if isinstance(value, (dict, list, collections.deque, bytearray)):
        return copy.copy(value)
    if kind.__module__.startswith("omegaconf."):
        return copy.deepcopy(value)  # plain values, by that library's own rule
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, torch.nn.Module)):
        return _dataclass(value, memo)
    return value


def _flat(items: Any) -> bool:
    """Whether there is nothing to look into: a long list of numbers is then copied at once."""
    return all(type(item) in _SCALARS for item in items)


def _partial(value: functools.partial[Any], memo: Memo) -> Any:
    args = tuple(snapshot(item, memo) for item in value.args)
    kwargs = {name: snapshot(item, memo) for name, item in value.keywords.items()}
    if not args:
        try:
            return configs.make(
                fdl.Partial, value.func, configs.bind(configs.signature(value.func), (), kwargs, partial=True)
            )
        except (TypeError, ValueError):
            pass  # no signature, or one that the keywords do not fit: the call below needs none
    # fdl.Partial would hand a positional argument over by name, and the next positional one would collide with it.
    return configs.config(functools.partial, value.func, *args, **kwargs)


def _dataclass(value: Any, memo: Memo) -> Any:
    """A config of the fields that are not at their defaults; ``value`` itself if it could not be built from those."""
    parameters = configs.signature_of(type(value)).parameters
    fields = {field.name: field for field in dataclasses.fields(value) if field.init}
    if any(p.default is p.empty and name not in fields for name, p in parameters.items() if p.kind not in _VARIADIC):
        return value  # an InitVar, or a constructor of its own: the instance does not know what it was given
    now = {name: snapshot(getattr(value, name), memo) for name in fields if name in parameters}
    return configs.make(fdl.Config, type(value), {n: v for n, v in now.items() if not _is_default(fields[n], v)})


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _as_it_is_now(value: Any, config: Any, memo: Memo) -> Any:
    """The captured config of ``value``, with those fields of a dataclass that were assigned since it was made."""
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, torch.nn.Module)):
        return config
    arguments = configs.arguments(config)
    changed: configs.Arguments = {}
    for field in dataclasses.fields(value):
        if field.init and hasattr(value, field.name):
            now = snapshot(getattr(value, field.name), memo)
            given = field.name in arguments
            if not (_same(now, arguments[field.name]) if given else _is_default(field, now)):
                changed[field.name] = now
    if changed and hasattr(value, "__post_init__"):
        fresh = _fresh(value, arguments)
        changed = {n: now for n, now in changed.items() if not _same(now, snapshot(getattr(fresh, str(n), _MISSING)))}
    return configs.make(fdl.Config, type(value), {**arguments, **changed}) if changed else config


_MISSING = object()
_BY_IDENTITY: Any = object.__eq__


def _fresh(value: Any, arguments: configs.Arguments) -> Any:
    """Another instance of the same arguments: what its ``__post_init__`` sets was not set by the user."""
    given = {str(n): getattr(value, str(n)) if isinstance(a, fdl.Buildable) else a for n, a in arguments.items()}
    try:
        return type(value)(**given)
    except Exception:  # noqa: BLE001  then every difference counts as the user's
        return _MISSING


def _is_default(field: dataclasses.Field[Any], now: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return _same(now, snapshot(field.default))
    if field.default_factory is dataclasses.MISSING:
        return False
    made = snapshot(field.default_factory())
    # What a factory makes is a new object each time: one that cannot be compared is taken for the factory's.
    return _same(now, made) or (type(now) is type(made) and type(now).__eq__ is _BY_IDENTITY)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  e.g. arrays, which do not compare to one truth
        return False
