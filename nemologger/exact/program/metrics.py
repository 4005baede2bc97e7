"""Metrics of torchmetrics that a program holds where Lightning does not see them: in a list, in an object, in a callback.

What they have counted is in no state dictionary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from torchmetrics import Metric

from nemologger.exact.reach.parts import held_by


def metrics_apart(holders: Mapping[str, object], model: nn.Module, not_theirs: Collection[str]) -> dict[str, Metric]:
    """Those that are no parts of ``model``, by path.

    Args:
        holders: The objects that may hold some, by path.
        model: What Lightning trains and saves.
        not_theirs: The names of attributes that belong to the framework.
    """
    seen = {id(part) for part in model.modules()}
    found: dict[str, Metric] = {}
    for place, item in held_by(holders, not_theirs):
        if not issubclass(type(item), nn.Module) or id(item) in seen or "_modules" not in vars(item):
            continue
        for inner, part in item.named_modules(prefix=place):
            if isinstance(part, Metric) and id(part) not in seen:
                seen.add(id(part))
                found[inner] = part
    return found
