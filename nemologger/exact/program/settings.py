"""What hooks set for an epoch or longer: which parameters train, which parts are in training mode, dropout's p, how often a
schedule is stepped, torch's default dtype.

A run that goes on in the middle of an epoch is not told that the epoch starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemologger.exact.reach.kinds import SCALARS

_PLAIN = frozenset(vars(nn.Module()))
_DTYPE = "torch:default_dtype"


class Settings:
    """Those of ``module``, and of Lightning's ``schedules``, now and when this was made: what has changed is kept."""

    def __init__(self, module: nn.Module, schedules: Sequence[object] = ()) -> None:
        self._module = module
        self._schedules = schedules
        self._dtype = self._of_program = torch.get_default_dtype()
        self._parameters = [(path, one, one.requires_grad) for path, one in module.named_parameters()]
        self._modes = [(path, one, one.training) for path, one in module.named_modules()]
        of_torch = {p: one for p, one in module.named_modules() if type(one).__module__.startswith("torch.nn.")}
        holders = [("module", path, one) for path, one in of_torch.items()]
        holders += [("schedule", str(i), one) for i, one in enumerate(schedules)]
        self._values = [
            (f"{kind}:{path}:{name}", vars(one), name, value)
            for kind, path, one in holders
            for name, value in vars(one).items()
            if type(value) in SCALARS and name not in _PLAIN
        ]

    def begin_batch(self) -> None:
        """A step may have another default dtype, set by Lightning for that alone: ``Trainer(precision="64-true")``."""
        self._of_program = torch.get_default_dtype()

    def to_plain(self, modes: Mapping[str, bool], *, within_step: bool = False) -> dict[str, Any]:
        """What has changed.

        Args:
            modes: For validation, what parts were in training mode before.
            within_step: One is under way.
        """
        changed: dict[str, Any] = {
            f"parameter:{path}:requires_grad": one.requires_grad
            for path, one, first in self._parameters
            if one.requires_grad != first
        }
        for path, one, first in self._modes:
            if modes.get(path, one.training) != first:
                changed[f"module:{path}:training"] = modes.get(path, one.training)
        for key, attributes, name, first in self._values:
            value = attributes.get(name)
            if type(value) in SCALARS and value != first:
                changed[key] = value
        dtype = self._of_program if within_step else torch.get_default_dtype()
        if dtype != self._dtype:
            changed[_DTYPE] = str(dtype).removeprefix("torch.")
        return changed

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Set what :meth:`to_plain` returned."""
        holders: dict[str, dict[str, Any]] = {
            "parameter": dict(self._module.named_parameters()),
            "module": dict(self._module.named_modules()),
            "schedule": {str(i): one for i, one in enumerate(self._schedules)},
        }
        for key, value in plain.items():
            if key == _DTYPE:
                torch.set_default_dtype(getattr(torch, value))
                continue
            kind, _, where = key.partition(":")
            path, _, name = where.rpartition(":")
            holder = holders[kind].get(path)
            if holder is not None and hasattr(holder, name):
                setattr(holder, name, value)
