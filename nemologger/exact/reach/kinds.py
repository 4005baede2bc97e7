"""What is known of a class: whether its objects are looked into, and where they keep what they have."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from functools import partial
from itertools import count
from operator import length_hint
from types import BuiltinFunctionType, FunctionType, GeneratorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from nemologger.exact.reach.code import is_class_of_the_program
from nemologger.exact.rng import GENERATORS

#: Numbers, texts and nothing, which have nothing within.
SCALARS = (int, float, bool, str, type(None))
#: Named here, as unions of types take time to make.
CALLED = (FunctionType, partial)
_CLOSED = (
    *SCALARS, bytes, torch.Tensor, np.ndarray, np.generic, type, ModuleType, BuiltinFunctionType, random.SystemRandom,
)  # fmt: skip
_CONTAINERS = (list, tuple, dict, nn.Module)
#: Locks, queues, threads, files and processes have numbers that are nobody's to set.
_OPEN = {"builtins", "collections", "functools", "types", "argparse", "dataclasses", "__main__", "random"}
_STANDARD = sys.stdlib_module_names - _OPEN
#: Their classes use no generators but the global ones.
_WITHOUT_OWN = ("torch", "numpy", "lightning", *(sys.stdlib_module_names - {"__main__"}))


class Kind(NamedTuple):
    """What is known of a class.

    Attributes:
        closed: Whether its objects are not looked into.
        generator: Whether they are generators.
        data: Whether they are tables or columns, of pandas say: like an array, with caches that say nothing of the run.
        slots: Its attributes in slots.
        own: Those of its bases that may use generators of their own.
        program: Those that the program has written.
        dictionary: Whether its objects have a ``__dict__``: the class itself always has one.
        simple: Whether all attributes of its objects are in that, and nothing else is to be known of them.
        holds: Whether its objects may keep something.
    """

    closed: bool
    generator: bool = False
    data: bool = False
    slots: Mapping[str, MemberDescriptorType] = {}
    own: tuple[type, ...] = ()
    program: tuple[type, ...] = ()
    dictionary: bool = False
    simple: bool = False
    holds: bool = False


#: Proxies, which pass every question on, and classes that raise for some.
_ODD = Kind(closed=True)
#: Asked hundreds of times in a look at a dataset.
_kinds: dict[type, Kind] = {}


def kind_of(kind: type) -> Kind:
    """What is known of the class."""
    try:
        return _kinds[kind]
    except Exception:  # noqa: BLE001  it is new, or a class without a hash
        return _look_at_first(kind)


def _look_at_first(kind: type) -> Kind:
    try:
        known = _kinds[kind] = _look_at(kind)
    except Exception:  # noqa: BLE001  a class without a hash, or one that even raises for its name
        return _ODD
    return known


def _look_at(kind: type) -> Kind:
    bases = kind.__mro__
    # A proxy passes every question on, and may not have yet what it stands for.
    is_proxy = any("__class__" in vars(base) or type(vars(base).get("__dict__")) is property for base in bases[:-1])
    is_key = type(kind).__eq__ is type.__eq__ and type(kind).__hash__ is type.__hash__
    is_key = is_key or type(kind).__module__ == "typing_extensions"  # its protocols are equal to those of typing
    if not is_key or (is_proxy and not module_of(kind).startswith("nemologger.")):
        return _ODD
    slots = {
        name: slot
        for base in bases
        if "__slots__" in vars(base)
        for name, slot in vars(base).items()
        if isinstance(slot, MemberDescriptorType)
    }
    own = tuple(base for base in reversed(bases) if module_of(base).partition(".")[0] not in _WITHOUT_OWN)
    closed, shared = _is_closed(kind), is_shared_number(kind)
    generator = not closed and issubclass(kind, GENERATORS)
    dictionary = kind.__dictoffset__ != 0
    more = bool(slots) or shared or issubclass(kind, (*CALLED, nn.Module))
    return Kind(
        closed=closed,
        generator=generator,
        data=hasattr(kind, "__array__") or hasattr(kind, "__array_interface__"),  # images of Pillow have the latter
        slots=slots,
        own=own,
        program=tuple(base for base in own if is_class_of_the_program(base)),
        dictionary=dictionary,
        simple=dictionary and not more,
        holds=(dictionary or bool(slots) or shared) and not generator,
    )


def _is_closed(kind: type) -> bool:
    return (
        issubclass(kind, _CLOSED)
        # A dataset may hold the trainer or the data module; their state is Lightning's business.
        or any(module_of(base).startswith("lightning.pytorch.") for base in kind.__mro__)
        # Nor are what loaders keep while they are gone through, and what they are wrapped in.
        or kind.__name__.endswith("DataLoaderIter")
        or module_of(kind).startswith(("nemologger.exact.", "nemologger.callbacks.deaf_workers"))
        or (module_of(kind).partition(".")[0] in _STANDARD and not is_shared_number(kind))
    )


def module_of(kind: type) -> str:
    """The name of its module; "" if it has none."""
    name = kind.__module__
    return name if isinstance(name, str) else ""


def is_ordinary(kind: type) -> bool:
    """Whether objects of the class can be asked what they are and have: proxies pass questions on, or raise."""
    return kind_of(kind) is not _ODD


def is_shared_number(kind: type) -> bool:
    """Whether it is that of ``multiprocessing.Value``, by which a program tells its workers the number of the epoch."""
    return kind.__name__ == "Synchronized" and kind.__module__ == "multiprocessing.sharedctypes"


def has_slots(kind: type) -> bool:
    """Whether objects of the class have attributes in slots that may be looked into."""
    return bool(kind_of(kind).slots) and not kind_of(kind).closed


def may_keep(kind: type) -> bool:
    """Whether objects of the class have attributes, and are no lists, dictionaries, modules, tables or generators."""
    known = kind_of(kind)
    return not (known.generator or known.data or issubclass(kind, _CONTAINERS)) and bool(
        known.slots or known.dictionary
    )


def may_hold_numbers(kind: type) -> bool:
    """Whether objects of the class have attributes to look at, and are no functions, modules, lists or tables."""
    return not (kind_of(kind).closed or issubclass(kind, FunctionType | MethodType | partial)) and may_keep(kind)


def has_only_a_dictionary(kind: type) -> bool:
    """Whether all attributes of objects of the class are in their ``__dict__``."""
    return kind_of(kind).simple


def is_generator(value: Any) -> bool:
    """Whether it is one; unlike isinstance(), without asking a proxy what it stands for."""
    return kind_of(type(value)).generator


def has_attributes(value: Any) -> bool:
    """Whether ``value`` is an object that may keep something."""
    return kind_of(type(value)).holds


def classes_of_the_program(value: Any) -> tuple[type, ...]:
    """Those that ``value`` is of, and that no library has written."""
    return kind_of(type(value)).program


def has_place(value: Any) -> bool:
    """Whether ``value`` is an iterator, one of python's own, and not at its end."""
    kind = type(value)
    if kind is GeneratorType:
        return value.gi_frame is not None
    return is_ordinary(kind) and kind.__module__ in ("builtins", "itertools") and hasattr(kind, "__next__")


def shown_place(value: Any) -> Any:
    """Where an iterator is, if it shows that: python's counters do, and those over lists; else an object like no other."""
    if type(value) is count:
        return repr(value)
    return length_hint(value) if hasattr(value, "__length_hint__") else object()
