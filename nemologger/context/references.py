"""Names of Python objects: under which module and symbol a class, function or constant can be found again."""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch

TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)

# torch spells a builtin function's place in several ways; these are the ones people import it from.
_BUILTINS_OF_TORCH = ("torch.nn.functional", "torch")
# Where the class is said to be -> where it can be found in other Python versions and in other processes.
_PUBLIC_MODULES = {"pathlib._local": "pathlib", "__mp_main__": "__main__"}
_PUBLIC_NAMES = {"TrainerContext", "FileArtifact", "DirArtifact", "Uncaptured"}


@dataclass(frozen=True)
class Reference:
    """Where an importable object is: ``symbol`` may have dots, for a nested class or a member of it."""

    module: str
    symbol: str

    def __str__(self) -> str:
        return f"{self.module}.{self.symbol}"

    def public(self) -> Reference:
        """The same object under the name to write down."""
        if self.module.startswith("nemologger.context.") and self.symbol in _PUBLIC_NAMES:
            return Reference("nemologger.io", self.symbol)
        return Reference(_PUBLIC_MODULES.get(self.module, self.module), self.symbol)


class Detour(LookupError):
    """A symbol that leads through something other than classes, such as a module that its module has imported."""


def is_reference_like(value: object) -> bool:
    """Whether ``value`` is written down by name: a class, a function, a member of an enumeration, a constant of torch."""
    return isinstance(value, (type, enum.Enum, *FUNCTIONS, *TORCH_CONSTANTS))


def find(module: str, symbol: str) -> Any:
    """The object at ``module`` and ``symbol``, if it is there already. Imports nothing and runs no code of the module.

    Raises:
        Detour: If the symbol leads through something other than classes.
        LookupError: If the module is not imported, or has no such symbol.
    """
    if module not in sys.modules:
        raise LookupError(f"module {module} is not imported")
    first, *rest = symbol.split(".")
    # Not getattr: a module may define __getattr__, which can import more.
    try:
        value = vars(sys.modules[module])[first]
    except KeyError:
        raise LookupError(f"module {module} has no {first!r}") from None
    for part in rest:
        if not isinstance(value, type) or part.startswith("__"):
            raise Detour(f"{module}.{symbol} does not lead through classes")
        try:
            value = getattr(value, part)
        except AttributeError:
            raise LookupError(f"{module}.{symbol}: class {value.__qualname__} has no {part!r}") from None
    return value


def reference_to(value: Any) -> Reference | None:
    """Where ``value`` can be found again, or None: for a lambda, what is local to a function, or hidden by its name."""
    for candidate in _candidates(value):
        try:
            found = find(candidate.module, candidate.symbol)
        except LookupError:
            continue
        # A bound method is made anew at each access; a decorated function may be what stands under the name.
        if found is value or (isinstance(value, types.MethodType) and found == value):
            return candidate
    return None


def _candidates(value: Any) -> list[Reference]:
    if isinstance(value, TORCH_CONSTANTS):
        return [Reference("torch", str(value).removeprefix("torch."))]
    if isinstance(value, enum.Enum):
        kind = type(value)
        return [Reference(kind.__module__, f"{kind.__qualname__}.{value.name}")] if value.name else []
    name, module = getattr(value, "__qualname__", None), getattr(value, "__module__", None)
    if isinstance(value, types.BuiltinFunctionType):
        return [Reference(place, value.__name__) for place in _BUILTINS_OF_TORCH if place in sys.modules]
    if isinstance(value, types.MethodType):
        owner = value.__self__
        if not isinstance(owner, type) or owner.__module__ != module:
            return []  # fiddle looks it up where the function was written
        name, module = f"{owner.__qualname__}.{value.__name__}", owner.__module__
    if not isinstance(name, str) or not isinstance(module, str):
        return []
    return [Reference(module, name)]
