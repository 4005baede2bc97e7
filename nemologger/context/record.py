"""What a captured object carries: the arguments it was made with."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import fiddle as fdl
import torch
from fiddle import daglish

from nemologger.context import configs
from nemologger.context.references import is_reference_like, reference_to
from nemologger.context.uncaptured import Uncaptured, type_name

_KEY = "_nemologger_capture"
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@dataclass
class Capture:
    """The arguments of one construction.

    Attributes:
        config: The constructor and its arguments as an ``fdl.Config``; None if they could not be taken.
        error: Why there is no config.
    """

    config: Any = None
    error: str | None = None

    def __copy__(self) -> Capture:
        return Capture(configs.copy(self.config), self.error)

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        # What was captured is not to be changed by anyone, so a copy of the object can share the tensors and objects in it.
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        # An object that can be pickled (for ddp_spawn, for another process) must not lose that by being captured.
        if self.config is not None and reference_to(self.config.__fn_or_cls__) is None:
            return Capture, (None, f"{self.config.__fn_or_cls__!r} cannot be found by its name in another process")
        return Capture, (_picklable(self.config), self.error)


def attach(instance: object, capture: Capture) -> None:
    """Leave ``capture`` with ``instance``; an object without a ``__dict__`` cannot carry it."""
    if hasattr(instance, "__dict__"):
        object.__setattr__(instance, _KEY, capture)  # past a frozen dataclass and torch.nn.Module


def captured(instance: object) -> Capture | None:
    """What :func:`attach` left with ``instance``."""
    if isinstance(instance, type):
        return None
    try:
        capture = object.__getattribute__(instance, "__dict__").get(_KEY)
    except AttributeError:
        return None
    return capture if isinstance(capture, Capture) else None


def _picklable(config: Any) -> Any:
    def visit(node: Any, state: Any) -> Any:
        if state.is_traversable(node) and (
            not isinstance(node, fdl.Buildable) or reference_to(node.__fn_or_cls__) is not None
        ):
            return state.map_children(node)
        if not isinstance(node, fdl.Buildable) and _can_pickle(node):
            return node
        return configs.config(Uncaptured, type_name(node), "it could not be sent to another process")

    return daglish.MemoizedTraversal.run(visit, config)


def _can_pickle(leaf: object) -> bool:
    if isinstance(leaf, (*_PLAIN, torch.Tensor, torch.nn.Module)):
        return True  # a tensor would only be copied once more to find out what is known
    if is_reference_like(leaf):
        return reference_to(leaf) is not None
    try:
        pickle.dumps(leaf)
    except Exception:  # noqa: BLE001  whatever an object raises here, it cannot travel
        return False
    return True
