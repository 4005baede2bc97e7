"""What can be reached from an object: its attributes, what functions were made with, and generators that its class uses."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import (
    BuiltinFunctionType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from nemologger.exact.program.variables import NAMESPACES, Reached, cells_of, is_of_the_program, names_in, of_call
from nemologger.exact.rng import GENERATORS

_DEEPEST = 12
_MOST_ITEMS = 32
_MOST_GENERATORS = 1024
_MOST_OBJECTS = 1000
_SCALARS = (int, float, bool, str, type(None))
_CLOSED = (
    *_SCALARS, bytes, torch.Tensor, np.ndarray, np.generic, type, ModuleType, BuiltinFunctionType, random.SystemRandom,
)  # fmt: skip
#: What is found most often and has nothing within.
_PLAIN = (*_SCALARS, GetSetDescriptorType, MemberDescriptorType, property)
_OF_CLASSES = (FunctionType, *_PLAIN)
#: Named here, as unions of types take time to make.
_LISTED, _CALLED = (list, tuple, dict), (FunctionType, partial)
#: Locks, queues, threads, files and processes have numbers that are nobody's to set.
_OPEN = {"builtins", "collections", "functools", "types", "argparse", "dataclasses", "__main__", "random"}
_STANDARD = sys.stdlib_module_names - _OPEN
_WITH_ADDRESS: Any = object.__repr__
#: Their classes use no generators but the global ones.
_WITHOUT_OWN = ("torch", "numpy", "lightning", *(sys.stdlib_module_names - {"__main__"}))
#: Of a module: what is no attribute, or in the checkpoint if it decides about anything.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}


class _Kind(NamedTuple):
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


class Crowd(NamedTuple):
    """Some objects.

    Attributes:
        path: Of the list or dictionary that they are in; "" if they are in none.
        names: Their places in it, or their paths.
        items: The objects.
    """

    path: str
    names: Sequence[Any]
    items: Sequence[Any]

    def path_of(self, place: int) -> str:
        """That of one of the objects."""
        return f"{self.path}.{_text_of(self.names[place], place)}" if self.path else str(self.names[place])


#: Asked hundreds of times in a look at a dataset.
_kinds: dict[type, _Kind] = {}
_names: dict[type, tuple[str, ...]] = {}


def walk(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every object within reach of ``roots``, with its path, ``"dataset.transform.rng"``; each once, and not thousands.

    After them come those that code names, ``"file:STATE"``, and the variables of its files and classes.
    """
    seen: set[int] = set()
    looked_at: set[int] = set()
    reached = Reached()
    waiting = [(name, root, 0) for name, root in roots.items()]
    most = _MOST_OBJECTS
    while waiting:
        for place, (path, value, depth) in enumerate(waiting):
            if len(seen) >= most:
                rest = waiting[place:]
                yield from _crowd("", [path for path, _, _ in rest], [item for _, item, _ in rest])
                break
            kind = _kind_of(type(value))
            if kind.closed or id(value) in seen or (depth and kind.data) or _is_network(value):
                continue
            seen.add(id(value))
            try:
                parts = _parts(value) if depth < _DEEPEST and not kind.generator else []
                names, items = _many(value)
            except Exception:  # noqa: BLE001  it does not want to be looked into
                continue
            yield path, value
            if items:
                yield from _crowd(path, names, items)
            if depth < _DEEPEST and not kind.generator:
                waiting += [(f"{path}.{name}", item, depth + 1) for name, item in parts if type(item) not in _PLAIN]
                waiting += [(name, item, depth + 1) for name, item in _globals_of(value, kind, looked_at)]
                _follow(value, kind, reached)
        most = len(seen) + _MOST_OBJECTS
        waiting = [(path, item, 1) for path, item in reached.follow() if _is_followed(item) and id(item) not in seen]
    yield from reached.places()


def _crowd(path: str, names: Sequence[Any], items: list[Any]) -> Iterator[tuple[str, Crowd]]:
    """The objects among ``items`` that may keep something: most lists are of numbers and texts."""
    kinds = _kinds_of(items)
    open_ = {number for number, kind in kinds.items() if not _kind_of(kind).closed and _may_keep(kind)}
    if not open_:
        return
    if not kinds.keys() <= open_:
        pairs = [(name, item) for name, item in zip(names, items, strict=True) if id(type(item)) in open_]
        names, items = [name for name, _ in pairs], [item for _, item in pairs]
    yield path, Crowd(path, names, items)


def _kinds_of(items: list[Any]) -> dict[int, type]:
    try:
        return {id(kind): kind for kind in set(map(type, items))}  # for each batch, of a million samples
    except Exception:  # noqa: BLE001  some have no hash
        return {id(kind): kind for kind in map(type, items)}


def _may_keep(kind: type) -> bool:
    known = _kind_of(kind)
    containers = (list, tuple, dict, nn.Module)
    return not (known.generator or known.data or issubclass(kind, containers)) and bool(known.slots or known.dictionary)


def may_hold_numbers(kind: type) -> bool:
    """Whether objects of the class have attributes to look at, and are no functions, modules, lists or tables."""
    return not (_kind_of(kind).closed or issubclass(kind, FunctionType | MethodType | partial)) and _may_keep(kind)


def has_only_a_dictionary(kind: type) -> bool:
    """Whether all attributes of objects of the class are in their ``__dict__``."""
    return _kind_of(kind).simple


def entries(value: Any) -> list[tuple[str, Any]]:
    """What a list, a tuple or a dictionary holds, by name.

    An entry of a dictionary has its number, if its key would be a text of many numbers, of an address in memory, or none.
    """
    if not isinstance(value, dict):
        return [(str(place), item) for place, item in enumerate(value)]
    return [(_text_of(key, number), item) for number, (key, item) in enumerate(dict.items(value))]


def _text_of(key: Any, number: int) -> str:
    kind = type(key)
    if kind in (str, int):
        return str(key)
    is_long = issubclass(kind, torch.Tensor | nn.Module) or not is_ordinary(kind)
    try:
        return str(number if is_long or kind.__repr__ is _WITH_ADDRESS else key)
    except Exception:  # noqa: BLE001  nothing is to be said of it
        return str(number)


def attributes(value: Any) -> dict[str, Any]:
    """Those of ``value``, also in slots."""
    known = _kind_of(type(value))
    if known.simple:
        return dict(getattr(value, "__dict__", {}))
    if _is_shared_number(type(value)):
        return {"value": value.value}
    own = dict(with_slots(value))
    if isinstance(value, _CALLED):
        return {**of_call(value), **own}
    if isinstance(value, nn.Module):
        buffers = own.get("_buffers")
        own = {name: item for name, item in own.items() if name not in _OF_MODULES}
        own |= {name: item for name, item in (buffers or {}).items() if item is not None}
    return own


def with_slots(value: Any) -> dict[str, Any]:
    """What ``vars()`` says of ``value``, and what it has in slots."""
    own: dict[str, Any] = getattr(value, "__dict__", {})
    return _in_slots(value) | own if has_slots(type(value)) else own


def has_slots(kind: type) -> bool:
    """Whether objects of the class have attributes in slots that may be looked into."""
    return bool(_kind_of(kind).slots) and not _kind_of(kind).closed


def _in_slots(value: Any) -> dict[str, Any]:
    found = {}
    for name, slot in _kind_of(type(value)).slots.items():
        try:
            found[name] = slot.__get__(value)
        except AttributeError:  # nothing is in it
            continue
    return found


def classes_of_the_program(value: Any) -> tuple[type, ...]:
    """Those that ``value`` is of, and that no library has written."""
    return _kind_of(type(value)).program


def has_attributes(value: Any) -> bool:
    """Whether ``value`` is an object that may keep something."""
    return _kind_of(type(value)).holds


def is_generator(value: Any) -> bool:
    """Whether it is one; unlike isinstance(), without asking a proxy what it stands for."""
    return _kind_of(type(value)).generator


def generators_of_class(value: Any) -> dict[str, Any]:
    """The generators among the attributes of the class of ``value``, by name, that it has none of its own for."""
    own = getattr(value, "__dict__", {})
    return {
        name: item
        for kind in _kind_of(type(value)).own
        for name, item in vars(kind).items()
        if type(item) not in _OF_CLASSES and _kind_of(type(item)).generator and name not in own
    }


def is_ordinary(kind: type) -> bool:
    """Whether objects of the class can be asked what they are and have: proxies pass questions on, or raise."""
    return _kind_of(kind) is not _ODD


_ODD = _Kind(closed=True)


def _kind_of(kind: type) -> _Kind:
    try:
        return _kinds[kind]
    except Exception:  # noqa: BLE001  it is new, or a class without a hash
        return _look_at_first(kind)


def _look_at_first(kind: type) -> _Kind:
    try:
        known = _kinds[kind] = _look_at(kind)
    except Exception:  # noqa: BLE001  a class without a hash, or one that even raises for its name
        return _ODD
    return known


def _look_at(kind: type) -> _Kind:
    bases = kind.__mro__
    # A proxy passes every question on, and may not have yet what it stands for.
    is_proxy = any("__class__" in vars(base) or type(vars(base).get("__dict__")) is property for base in bases[:-1])
    is_key = type(kind).__eq__ is type.__eq__ and type(kind).__hash__ is type.__hash__
    if not is_key or (is_proxy and not module_of(kind).startswith("nemologger.")):
        return _ODD
    closed = (
        issubclass(kind, _CLOSED)
        # A dataset may hold the trainer or the data module; their state is Lightning's business.
        or any(module_of(base).startswith("lightning.pytorch.") for base in bases)
        # Nor are what loaders keep while they are gone through, and what they are wrapped in.
        or kind.__name__.endswith("DataLoaderIter")
        or module_of(kind).startswith("nemologger.exact.")
        or (module_of(kind).partition(".")[0] in _STANDARD and not _is_shared_number(kind))
    )
    slots = {
        name: slot
        for base in bases
        if "__slots__" in vars(base)
        for name, slot in vars(base).items()
        if isinstance(slot, MemberDescriptorType)
    }
    own = tuple(base for base in reversed(bases) if module_of(base).partition(".")[0] not in _WITHOUT_OWN)
    data = hasattr(kind, "__array__") or hasattr(kind, "__array_interface__")  # images of Pillow have the latter
    program = tuple(base for base in own if is_of_the_program(module_of(base)))
    generator = not closed and issubclass(kind, GENERATORS)
    dictionary, shared = kind.__dictoffset__ != 0, _is_shared_number(kind)
    more = bool(slots) or shared or issubclass(kind, (*_CALLED, nn.Module))
    holds = (dictionary or bool(slots) or shared) and not generator
    return _Kind(closed, generator, data, slots, own, program, dictionary, dictionary and not more, holds)


def module_of(kind: type) -> str:
    """The name of its module; "" if it has none."""
    name = kind.__module__
    return name if isinstance(name, str) else ""


def _globals_of(value: Any, kind: _Kind, looked_at: set[int]) -> list[tuple[str, Any]]:
    """The generators among the globals of a file that code of ``value`` names."""
    function = value.__func__ if type(value) is MethodType else value
    if type(function) is FunctionType:
        places = [(function.__module__, function.__globals__, names_in(function.__code__))]
    else:
        new = [base for base in kind.own if id(base) not in looked_at]
        looked_at.update(map(id, new))
        places = [
            (module_of(base), getattr(sys.modules.get(module_of(base)), "__dict__", {}), _named_by(base))
            for base in reversed(new)
        ]
    return [
        (f"{module}:{name}", there[name])
        for module, there, named in places
        for name in named
        if name in there and _kind_of(type(there[name])).generator
    ]


def _follow(value: Any, kind: _Kind, reached: Reached) -> None:
    function = value.__func__ if isinstance(value, MethodType) else value
    if isinstance(function, FunctionType):
        reached.add(function)
    for base in kind.program:
        reached.add_class(base)


def _is_followed(value: Any) -> bool:
    """Whether to look into a global variable: at functions and objects of the program."""
    return issubclass(type(value), (FunctionType, partial, *NAMESPACES)) or bool(_kind_of(type(value)).program)


def _named_by(kind: type) -> tuple[str, ...]:
    if kind not in _names:
        methods = (staticmethod, classmethod)
        functions = [item.__func__ if type(item) in methods else item for item in vars(kind).values()]
        codes = [item.__code__ for item in functions if isinstance(item, FunctionType)]
        _names[kind] = tuple(sorted(frozenset().union(*map(names_in, codes))))
    return _names[kind]


def _is_shared_number(kind: type) -> bool:
    """Whether it is that of ``multiprocessing.Value``, by which a program tells its workers the number of the epoch."""
    return kind.__name__ == "Synchronized" and kind.__module__ == "multiprocessing.sharedctypes"


def _many(value: Any) -> tuple[Sequence[Any], list[Any]]:
    """The places, and the items, of a long list or dictionary."""
    if not issubclass(type(value), _LISTED) or len(value) <= _MOST_ITEMS:
        return [], []
    return ([*dict.keys(value)], [*dict.values(value)]) if isinstance(value, dict) else (range(len(value)), [*value])


def _is_network(value: Any) -> bool:
    """Whether ``value`` is no transform, but a model, or a part of one that is trained: that is in the checkpoint."""
    if not issubclass(type(value), nn.Module):
        return False
    try:
        return next(value.parameters(), None) is not None
    except Exception:  # noqa: BLE001  nobody has called its __init__()
        return True


def _parts(value: Any) -> list[tuple[str, Any]]:
    # No other mappings: one may read files, or raise for what a configuration lacks.
    if isinstance(value, _LISTED):
        most = _MOST_ITEMS
        if isinstance(value, list | tuple) and value and is_generator(value[0]):
            most = _MOST_GENERATORS  # one for each sample
        if len(value) > most:
            return []
        return entries(value)
    if isinstance(value, MethodType):
        return [("__self__", value.__self__)]
    parts: list[tuple[Any, Any]] = [*(vars(value) if isinstance(value, _CALLED) else attributes(value)).items()]
    if isinstance(value, FunctionType):
        parts += cells_of(value).items()
        parts += [*enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
    elif isinstance(value, partial):
        parts += [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    else:
        parts += generators_of_class(value).items()
        if isinstance(value, nn.Module):
            parts += [*value.named_children()]
    return [(str(name), item) for name, item in parts]
