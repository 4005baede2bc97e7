"""Where a program has its objects: those that a checkpoint cannot hold, and that hooks put into it.

A module that saves its loss, or a data module its scaler, does so for Lightning's pickled files. The program has made the
object, and makes it again at its next start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nemologger.lightning_port.hooks import callbacks
from nemologger.lightning_port.loaders import data_module

if TYPE_CHECKING:
    import lightning.pytorch as pl

_DEEPEST = 6
_MOST = 20_000

Place = tuple[str | int, ...]


def places_of(trainer: pl.Trainer) -> Callable[[Any], Place | None]:
    """Says where module, data module, a callback or a schedule has an object among its attributes, and what these hold."""
    known: dict[int, Place] = {}

    def place(value: Any) -> Place | None:
        if not known:
            known.update(_walk(_roots(trainer)))
        return known.get(id(value))

    return place


def at(trainer: pl.Trainer, place: object) -> Any:
    """What the program has in a place of :func:`places_of` now; None if there is nothing, or that is no place."""
    if not isinstance(place, list) or not all(isinstance(step, str | int) for step in place):
        return None  # a stranger's file may say anything
    value: Any = _roots(trainer)
    for step in place:
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if not isinstance(value, Mapping) or step not in value:
            return None
        value = value[step]
    return value


def _roots(trainer: pl.Trainer) -> Mapping[str, Any]:
    roots: dict[str, Any] = {"module": trainer.lightning_module, "data": data_module(trainer)}
    roots |= {callback.state_key: callback for callback in callbacks(trainer)}
    roots |= {f"schedule {i}": config.scheduler for i, config in enumerate(trainer.lr_scheduler_configs)}
    return {name: vars(root) for name, root in roots.items() if hasattr(root, "__dict__")}


def _walk(roots: Mapping[str, Any]) -> dict[int, Place]:
    found: dict[int, Place] = {}
    waiting: list[tuple[Place, Any]] = [((), roots)]
    while waiting and len(found) < _MOST:
        place, value = waiting.pop(0)
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for step, item in items:
            if not isinstance(step, str | int):
                continue
            if place:
                found.setdefault(id(item), (*place, step))
            if isinstance(item, Mapping | list | tuple) and len(place) < _DEEPEST:
                waiting.append(((*place, step), item))
    return found
