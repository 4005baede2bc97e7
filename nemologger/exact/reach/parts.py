"""What an object holds, by name: its attributes, the entries of a list, what a function was made with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType
from typing import Any

import torch
from torch import nn

from nemologger.exact.reach.kinds import (
    CALLED,
    SCALARS,
    has_slots,
    is_generator,
    is_ordinary,
    is_shared_number,
    kind_of,
)
from nemologger.exact.reach.variables import cells_of, of_call

_MOST_ITEMS = 32
_MOST_GENERATORS = 1024
#: Named here, as unions of types take time to make.
_LISTED = (list, tuple, dict)
#: What is found most often and has nothing within.
_PLAIN = (*SCALARS, GetSetDescriptorType, MemberDescriptorType, property)
_OF_CLASSES = (FunctionType, *_PLAIN)
_WITH_ADDRESS: Any = object.__repr__
#: Of a module: what is no attribute, or in the checkpoint if it decides about anything.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}


# --- attributes -------------------------------------------------------------------------------------------------------


def attributes(value: Any) -> dict[str, Any]:
    """Those of ``value``, also in slots."""
    kind = type(value)
    if kind_of(kind).simple:
        return dict(getattr(value, "__dict__", {}))
    if is_shared_number(kind):
        return {"value": value.value}
    own = dict(with_slots(value))
    if isinstance(value, CALLED):
        return {**of_call(value), **own}
    if isinstance(value, nn.Module):
        buffers = own.get("_buffers") or {}
        own = {name: item for name, item in own.items() if name not in _OF_MODULES}
        own |= {name: item for name, item in buffers.items() if item is not None}
    return own


def with_slots(value: Any) -> dict[str, Any]:
    """What ``vars()`` says of ``value``, and what it has in slots."""
    own = _dictionary_of(value)
    return _in_slots(value) | own if has_slots(type(value)) else own


def _dictionary_of(value: Any) -> dict[str, Any]:
    """Its ``__dict__``, if it has one: a class with slots may answer for any name by ``__getattr__()``."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found


def _in_slots(value: Any) -> dict[str, Any]:
    found = {}
    for name, slot in kind_of(type(value)).slots.items():
        try:
            found[name] = slot.__get__(value)
        except AttributeError:  # nothing is in it
            continue
    return found


def generators_of_class(value: Any) -> dict[str, Any]:
    """The generators among the attributes of the class of ``value``, by name, that it has none of its own for."""
    own = _dictionary_of(value)
    return {
        name: item
        for kind in kind_of(type(value)).own
        for name, item in vars(kind).items()
        if type(item) not in _OF_CLASSES and kind_of(type(item)).generator and name not in own
    }


# --- lists and dictionaries -------------------------------------------------------------------------------------------


def entries(value: Any) -> list[tuple[str, Any]]:
    """What a list, a tuple or a dictionary holds, by name.

    An entry of a dictionary has its number, if its key would be a text of many numbers, of an address in memory, or none.
    """
    if not isinstance(value, dict):
        return [(str(place), item) for place, item in enumerate(value)]
    return [(text_of(key, number), item) for number, (key, item) in enumerate(dict.items(value))]


def items_of(path: str, value: Any, most: int = _MOST_ITEMS) -> Iterator[tuple[str, Any]]:
    """``value``, and what it holds if it is a list or dictionary of ``most`` at most, by path; within, of fewer."""
    yield path, value
    if type(value) in (list, tuple, dict) and 0 < len(value) <= most:
        for name, item in entries(value):
            yield from items_of(f"{path}.{name}", item, most // _MOST_ITEMS)


def held_by(holders: Mapping[str, Any], without: Collection[str], most: int = _MOST_ITEMS) -> Iterator[tuple[str, Any]]:
    """The :func:`items_of` the attributes of ``holders``, but for those of the names ``without``."""
    for path, holder in holders.items():
        for name, value in with_slots(holder).items():
            if name not in without:
                yield from items_of(f"{path}.{name}", value, most)


def text_of(key: Any, number: int) -> str:
    """``key`` as a part of a path, or ``number`` for it."""
    kind = type(key)
    if kind in (str, int):
        return str(key)
    is_long = issubclass(kind, torch.Tensor | nn.Module) or not is_ordinary(kind)
    try:
        return str(number if is_long or kind.__repr__ is _WITH_ADDRESS else key)
    except Exception:  # noqa: BLE001  nothing is to be said of it
        return str(number)


def many(value: Any) -> tuple[Sequence[Any], list[Any]]:
    """The places, and the items, of a long list or dictionary; none of a short one, which has them among its parts."""
    if not issubclass(type(value), _LISTED) or len(value) <= _MOST_ITEMS:
        return [], []
    return ([*dict.keys(value)], [*dict.values(value)]) if isinstance(value, dict) else (range(len(value)), [*value])


# --- all of it --------------------------------------------------------------------------------------------------------


def parts(value: Any) -> list[tuple[str, Any]]:
    """What ``value`` holds that may hold something in turn, by name."""
    return [(str(name), item) for name, item in _parts(value) if type(item) not in _PLAIN]


def _parts(value: Any) -> list[tuple[Any, Any]]:
    # No other mappings: one may read files, or raise for what a configuration lacks.
    if isinstance(value, _LISTED):
        return [*entries(value)] if len(value) <= _most_of(value) else []
    if isinstance(value, MethodType):
        return [("__self__", value.__self__)]
    found: list[tuple[Any, Any]] = [*(vars(value) if isinstance(value, CALLED) else attributes(value)).items()]
    if isinstance(value, FunctionType):
        found += cells_of(value).items()
        found += [*enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
    elif isinstance(value, partial):
        found += [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    else:
        found += generators_of_class(value).items()
        if isinstance(value, nn.Module):
            found += [*value.named_children()]
    return found


def _most_of(listed: Any) -> int:
    of_generators = isinstance(listed, list | tuple) and listed and is_generator(listed[0])  # one for each sample
    return _MOST_GENERATORS if of_generators else _MOST_ITEMS
