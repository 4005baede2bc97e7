"""What a program has hooked into its modules and parameters: functions and objects that each step calls."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from nemologger.exact.reach.code import is_function_of_the_program
from nemologger.exact.reach.objects import within

_OF_MODULES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
#: In the path of what hooks keep.
HOOKED = "_hooks."
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def hooks_of(path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Where to look for what hooks of ``module`` and its parts keep, by path."""
    for place, part in module.named_modules(prefix=path):
        hooked: list[tuple[str, Any, tuple[str, ...]]] = [(place, part, _OF_MODULES)]
        hooked += [(f"{place}.{name}", one, _OF_PARAMETERS) for name, one in part.named_parameters(recurse=False)]
        for where, one, kinds in hooked:
            for kind in kinds:
                hooks = getattr(one, kind, None)
                for number, hook in enumerate(filter(_is_of_the_program, hooks.values() if hooks else ())):
                    yield from within(f"{where}.{kind}.{number}", hook)


def _is_of_the_program(hook: Any) -> bool:
    """Whether it is no function of a library; of objects their class says so."""
    while isinstance(hook, partial | MethodType):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    if not isinstance(hook, FunctionType):
        return True
    return is_function_of_the_program(hook) and not str(hook.__module__).startswith("nemologger.")
