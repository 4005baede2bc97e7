"""What a configuration of OmegaConf may ask for with ``${name:...}``, here as with NeMo."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from nemologger.combination import sweep_job


def register_resolvers() -> None:
    """Make ``sweep_job``, the name of the combination, and NeMo's ``multiply`` and ``sum`` known, unless somebody has.

    Example:
        >>> register_resolvers()
        >>> OmegaConf.create({"size": "${multiply:2,4}"})["size"]
        8
    """

    def name() -> str:
        job = sweep_job()
        return "" if job is None else job.name

    resolvers: dict[str, Callable[..., Any]] = {"sweep_job": name, "multiply": operator.mul, "sum": operator.add}
    for key, resolver in resolvers.items():
        if not OmegaConf.has_resolver(key):
            OmegaConf.register_new_resolver(key, resolver)
