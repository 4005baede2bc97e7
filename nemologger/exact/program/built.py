"""What a program gives its optimizers and schedules when it makes them: the states of a checkpoint take the place of that.

Who changes one of these numbers, and goes on with a run, expects it to count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from nemologger.exact.program.flags import is_of_clock

#: By optimizer or schedule, and by name: a text for each number, list of numbers, or word.
Built = dict[str, dict[str, str]]

#: Of a schedule: where it is, and what follows from the optimizer's learning rates.
_FOLLOWS = frozenset({"last_epoch", "_step_count", "_last_lr", "base_lrs"})
_WORDS = (bool, int, float, str, type(None))
_MOST_SAID, _LONGEST = 4, 80


def built(optimizers: Sequence[Optimizer], schedules: Sequence[Any]) -> Built:
    """For ``on_fit_start``: what of ``optimizers`` and ``schedules`` a checkpoint will take the place of."""
    found: Built = {}
    for i, optimizer in enumerate(optimizers):
        groups = optimizer.param_groups
        told = [_of_group(f"group {n}: " if len(groups) > 1 else "", group) for n, group in enumerate(groups)]
        found[f"optimizer {i}"] = {name: text for one in told for name, text in one.items()}
    for i, schedule in enumerate(schedules):
        found[f"schedule {i} ({type(schedule).__name__})"] = dict(_told("", schedule.state_dict()))
    return found


def in_effect(then: Built, now: Built) -> Built:
    """``now``, but for what is ``then``'s, which counts."""
    return {what: names | then.get(what, {}) for what, names in now.items()} if _are_alike(then, now) else now


def changed(then: Built, now: Built) -> Iterator[tuple[str, str]]:
    """Of which optimizer or schedule something is not what it was, and what that is."""
    for what, names in now.items() if _are_alike(then, now) else ():
        before = then.get(what, {})
        others = [name for name, text in names.items() if before.get(name, text) != text]
        if others:
            said = [
                f"{name} {before[name]:.{_LONGEST}} ({names[name]:.{_LONGEST}} here)" for name in others[:_MOST_SAID]
            ]
            said += [f"and {rest} more"] if (rest := len(others) - _MOST_SAID) > 0 else []
            yield what, ", ".join(said)


def _are_alike(then: Built, now: Built) -> bool:
    """Whether the schedules are of the same kinds: when they are made, some set what the optimizer was made with."""
    return {*then} == {*now}


def _of_group(prefix: str, group: Mapping[str, Any]) -> dict[str, str]:
    """A schedule has set ``lr`` for its first step, perhaps by the length of the run: ``initial_lr`` is the program's."""
    leave = {"params", "param_names", *(["lr"] if "initial_lr" in group else [])}
    return dict(_told(prefix, {name: value for name, value in group.items() if name not in leave}))


def _told(prefix: str, state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in state.items():
        if name in _FOLLOWS:
            continue
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                yield from _told(f"{prefix}{name}.{place}.", item) if isinstance(item, Mapping) else ()
        elif (text := _text(value)) is not None:
            yield f"{prefix}{name}", text


def _text(value: Any) -> str | None:
    """None for what is no number or word, and holds something else."""
    if isinstance(value, list | tuple):
        texts = [_text(item) for item in value]
        return None if None in texts else f"[{', '.join(map(str, texts))}]"
    if isinstance(value, Mapping):
        return _text([*value, *value.values()])
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.item() if value.ndim == 0 else None
    return str(value) if type(value) in _WORDS and not is_of_clock(value) else None
