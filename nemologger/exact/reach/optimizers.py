"""What an optimizer of the program keeps beside what torch saves of it: ``state`` and ``param_groups``.

Slow weights of a lookahead, a count of its steps, norms of the last gradients, a generator for noise. A ``state_dict()`` of
its own may have some of that, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nemologger.exact.reach.views import View
from nemologger.exact.values.tensors import leaves, memory_of

#: Set by torch itself, some of them when there is a schedule: that wraps ``step``, too.
_OF_TORCH = {*vars(Optimizer([nn.Parameter(torch.zeros(1))], {})), "_opt_called", "_step_count", "step"}
_SAVED = ("state", "param_groups", "defaults")


class OfOptimizer(View):
    """The attributes of an optimizer that no checkpoint has, and that are no other name for those of one within."""

    __slots__ = ("_optimizer",)
    _optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(_optimizer=optimizer)

    def _entries(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self._optimizer).items() if name not in _OF_TORCH}
        inner = [one for one in own.values() if issubclass(type(one), Optimizer)]
        theirs = {id(vars(one).get(name)) for one in (self._optimizer, *inner) for name in _SAVED}
        own = {name: value for name, value in own.items() if id(value) not in theirs}
        defaults = vars(self._optimizer).get("defaults")  # a step may read them, and only param_groups are saved
        return own if any(vars(one).get("defaults") is defaults for one in inner) else own | {"defaults": defaults}

    def _set(self, name: str, value: Any) -> None:
        setattr(self._optimizer, name, value)


def memory_in_states(optimizers: Iterable[Optimizer]) -> set[int]:
    """That of the tensors that they save themselves."""
    found: set[int] = set()
    for optimizer in optimizers:
        try:
            found |= {memory_of(leaf) for leaf in leaves(optimizer.state_dict()) if isinstance(leaf, torch.Tensor)}
        except Exception:  # noqa: BLE001  whatever a stranger's raises is no reason to end training
            continue
    return found
