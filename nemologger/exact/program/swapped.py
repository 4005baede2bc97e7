"""Attributes that a program sets to something else of its own: another function, another phase, another part of the module.

``self.loss_fn = F.l1_loss`` in the hook of some epoch, ``dataset.transform = strong``: the epochs after it go on with that,
a resumed run begins with what the program makes. Members of an enumeration are kept, by name. The rest is only named: which
function a text stands for is not for a checkpoint to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from nemologger.exact.reach.kinds import is_ordinary, module_of
from nemologger.exact.reach.parts import with_slots
from nemologger.exact.reach.variables import set_in
from nemologger.exact.values import contents

_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, type)
#: What these hold is looked at elsewhere. What is there or not is most often made when it is needed.
_OTHERS: tuple[type, ...] = (*contents.SCALARS, *contents.KINDS)


class Swapped:
    """What some attributes are, now and when training began.

    Args:
        holders: Gives the objects that have them, by path.
        model: Its parts are looked at, too.
        not_theirs: The names of attributes that belong to the framework.
    """

    def __init__(
        self, holders: Callable[[], Mapping[str, object]], model: nn.Module, not_theirs: Collection[str]
    ) -> None:
        self._holders = holders
        self._model = model
        self._not_theirs = not_theirs
        self._first: dict[str, str] = {}

    def begin(self, members: Mapping[str, str]) -> None:
        """The hooks that start training are done. ``members``: of enumerations, as they were in the life before."""
        found = {path: (holder, name, value) for path, holder, name, value in self._found()}
        self._first = {path: _what(value) for path, (_, _, value) in found.items()}
        for path, member in members.items():
            holder, name, value = found.get(path, (None, "", None))
            if _is_member(value) and member in type(value).__members__:
                set_in(holder, name, type(value)[member])

    def changed(self) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
        """The members of enumerations that have changed, and what else is another one: what it was, and what it is."""
        members: dict[str, str] = {}
        others: dict[str, tuple[str, str]] = {}
        for path, _, _, value in self._found():
            then = self._first.get(path)
            if then is None or then == (now := _what(value)):
                continue
            if _is_member(value):
                members[path] = now
            else:
                others[path] = then, now
        return members, others

    def _found(self) -> Iterator[tuple[str, Any, str, Any]]:
        for path, holder in self._holders().items():
            for name, value in with_slots(holder).items():
                if name not in self._not_theirs and _can_be_told(value):
                    yield f"{path}.{name}", holder, name, value
        for path, part in self._model.named_modules():
            if not isinstance(part, LazyModuleMixin):  # it becomes another one with the first batch, in each life
                yield f"module.{path}", None, "", part


def _is_member(value: Any) -> bool:
    return issubclass(type(value), Enum)


def _can_be_told(value: Any) -> bool:
    kind = type(value)
    if issubclass(kind, type):
        return is_ordinary(value)
    return is_ordinary(kind) and (_is_member(value) or not issubclass(kind, _OTHERS))


def _what(value: Any) -> str:
    """A name for it, with the line where a function is: two may have the same, those without a name for example."""
    if _is_member(value):
        return str(value.name)
    named = value if issubclass(type(value), _FUNCTIONS) else type(value)
    line = f":{value.__code__.co_firstlineno}" if type(value) is FunctionType else ""
    module = module_of(named) if issubclass(type(named), type) else getattr(named, "__module__", None)
    return f"{module}.{getattr(named, '__qualname__', '?')}{line}"
