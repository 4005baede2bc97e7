"""What hooks set on a module for an epoch or longer: which parameters train, which parts are in training mode, dropout's p.

A run that goes on in the middle of an epoch is not told that the epoch starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nemologger.exact.reach.kinds import SCALARS

_PLAIN = frozenset(vars(nn.Module()))


class Settings:
    """Those of ``module``, now and when this was made: what has changed in between is kept."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = [(path, one, one.requires_grad) for path, one in module.named_parameters()]
        self._modes = [(path, one, one.training) for path, one in module.named_modules()]
        self._values = [
            (path, vars(one), name, value)
            for path, one in module.named_modules()
            if type(one).__module__.startswith("torch.nn.")
            for name, value in vars(one).items()
            if type(value) in SCALARS and name not in _PLAIN
        ]

    def to_plain(self, modes: Mapping[str, bool]) -> dict[str, Any]:
        """What has changed. ``modes``: for validation, what parts were in training mode before."""
        changed: dict[str, Any] = {
            f"parameter:{path}:requires_grad": one.requires_grad
            for path, one, first in self._parameters
            if one.requires_grad != first
        }
        for path, one, first in self._modes:
            if modes.get(path, one.training) != first:
                changed[f"module:{path}:training"] = modes.get(path, one.training)
        for path, attributes, name, first in self._values:
            value = attributes.get(name)
            if type(value) in SCALARS and value != first:
                changed[f"module:{path}:{name}"] = value
        return changed

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Set what :meth:`to_plain` returned."""
        holders = {"parameter": dict(self._module.named_parameters()), "module": dict(self._module.named_modules())}
        for key, value in plain.items():
            kind, _, where = key.partition(":")
            path, _, name = where.rpartition(":")
            holder: Any = holders[kind].get(path)
            if holder is not None and hasattr(holder, name):
                setattr(holder, name, value)
