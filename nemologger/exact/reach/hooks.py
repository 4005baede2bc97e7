"""What a program has hooked into its modules, parameters and optimizers: functions and objects that each step calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as of_modules
from torch.optim import Optimizer
from torch.optim import optimizer as of_optimizers

from nemologger.exact.reach.code import is_function_of_the_program
from nemologger.exact.reach.objects import is_of_the_program, within

_OF_MODULES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
#: In the path of what hooks keep.
HOOKED = "_hooks."
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_CALLED = (FunctionType, MethodType, partial)
#: Those of all modules, and of all optimizers.
_GLOBAL = (
    ("torch.modules", of_modules, tuple(f"_global{kind}" for kind in _OF_MODULES)),
    ("torch.optimizers", of_optimizers, ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")),
)


def hooks_of(path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Where to look for what hooks of ``module`` and its parts keep, by path."""
    for place, one, kinds in _of_module(path, module):
        yield from _hooked(place, one, kinds)
        yield from _in_place_of(place, one, "forward") if isinstance(one, nn.Module) else ()


def registered(path: str, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, list[str]]:
    """The names of the hooks that the program has registered, by where."""
    more = [(f"optimizer {i}", optimizer, _OF_OPTIMIZERS) for i, optimizer in enumerate(optimizers)]
    found = {}
    for place, one, kinds in chain(_of_module(path, module), more, _GLOBAL):
        for kind in kinds:
            hooks = getattr(one, kind, None)
            theirs = [hook for hook in hooks.values() if _is_of_the_program(hook)] if hooks else ()
            if names := [_name(hook) for hook in theirs if isinstance(hook, _CALLED) or is_of_the_program(hook)]:
                found[f"{place}.{kind}"] = names
    return found


def _name(hook: Any) -> str:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _of_module(path: str, module: nn.Module) -> Iterator[tuple[str, Any, Sequence[str]]]:
    for place, part in module.named_modules(prefix=path):
        yield place, part, _OF_MODULES
        for name, one in (vars(part).get("_parameters") or {}).items():  # torch's way takes longer than all else here
            if one is not None:
                yield f"{place}.{name}", one, _OF_PARAMETERS


def hooks_of_all(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Any]]:
    """The same of ``optimizers``, and of what is hooked into whichever module and optimizer there is."""
    for i, optimizer in enumerate(optimizers):
        yield from _hooked(f"optimizer {i}", optimizer, _OF_OPTIMIZERS)
        yield from _in_place_of(f"optimizer {i}", optimizer, "step")
    for place, one, kinds in _GLOBAL:
        yield from _hooked(place, one, kinds)


def _hooked(path: str, one: Any, kinds: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for kind in kinds:
        hooks = getattr(one, kind, None)
        for number, hook in enumerate(filter(_is_of_the_program, hooks.values() if hooks else ())):
            yield from within(f"{path}.{kind}.{number}", hook)


def _in_place_of(path: str, one: Any, name: str) -> list[tuple[str, Any]]:
    """A function that a program has put in the place of a method."""
    function = vars(one).get(name)
    return within(f"{path}.{name}", function) if function is not None and _is_of_the_program(function) else []


def _is_of_the_program(hook: Any) -> bool:
    """Whether it is no function of a library; of objects their class says so."""
    while isinstance(hook, partial | MethodType):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    if not isinstance(hook, FunctionType):
        return True
    return is_function_of_the_program(hook) and not str(hook.__module__).startswith("nemologger.")
