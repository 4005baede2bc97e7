"""Checkpoints of earlier versions: what a ``collate_fn`` was made with had other names there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch.utils.data import DataLoader

from nemologger.exact.program.owned import Values
from nemologger.exact.reach.variables import cells_of
from nemologger.exact.reach.walk import walk


def renamed(values: Values, loader: Any) -> Values:
    """``values`` by the names of today, of what is within reach of ``loader``."""
    if not isinstance(loader, DataLoader):
        return values
    roots = {"dataset": loader.dataset, "collate_fn": loader.collate_fn}
    today = {id(found): path for path, found in walk(roots)}
    behind = {**roots, "collate_fn": _behind(loader.collate_fn)}
    names = {path: today[id(found)] for path, found in walk(behind) if id(found) in today}

    def name(path: str) -> str:
        holder, _, last = path.rpartition(".")
        return names.get(path) or (f"{names[holder]}.{last}" if holder in names else path)

    generators, counters = (
        {name(path): value for path, value in d.items()} for d in (values.generators, values.counters)
    )
    contents = None if values.contents is None else {name(path): value for path, value in values.contents.items()}
    return replace(values, generators=generators, counters=counters, contents=contents)


def _behind(function: Any) -> Any:
    if isinstance(function, partial):
        return [_behind(function.func), *function.args, *function.keywords.values()]
    if isinstance(function, FunctionType):
        return [*cells_of(function).values()]
    return function.__self__ if isinstance(function, MethodType) else function
