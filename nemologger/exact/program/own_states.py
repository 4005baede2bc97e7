"""Objects that are no modules and have a state of their own.

Averages of weights are such (diffusers' EMAModel, torch_ema's), and optimizers, schedules and scalers that a module keeps
for itself. No checkpoint holds what is no module and not the trainer's. Who writes ``state_dict()`` and
``load_state_dict()`` says with them what there is to be kept, so those are called, whoever's class it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from inspect import getattr_static
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from nemologger.exact.reach.kinds import is_ordinary, module_of
from nemologger.exact.reach.parts import held_by, items_of
from nemologger.exact.values import contents, plain_contents
from nemologger.exact.values.tensors import leaves, moved, on_device

#: Of what is not there in time.
IN_TIME = "and what is made later is not brought back: make it in setup() or on_train_start()"

#: Somebody else's business: what is in the checkpoint already, and what belongs to data.
OTHERS = (nn.Module, Dataset, Sampler, DataLoader)
_METHODS = ("state_dict", "load_state_dict")
#: What is filled while training goes on, as a buffer of samples to draw from, is no loader.
_FILLED_BY = ("add", "append", "extend", "push")
_ABSENT = object()


class OwnStates:
    """The states of such objects among the attributes of others, or in short lists and dictionaries there.

    All of a state is kept, changed or not, as of an optimizer. One that cannot be kept is named when it has changed since
    this was made.

    Args:
        holders: Gives the objects that may hold some, by path.
        saved: Gives objects that are in the checkpoint anyway, with all that they hold.
        not_theirs: For each of the holders, the names of attributes that belong to the framework.
        most: Bytes that are kept at most.

    Attributes:
        paths: Where they were when this was made, or asked for them last.
    """

    def __init__(
        self,
        holders: Callable[[], Mapping[str, object]],
        saved: Callable[[], Iterable[object]],
        not_theirs: Collection[str],
        most: int,
    ) -> None:
        self._holders = holders
        self._saved = saved
        self._not_theirs = not_theirs
        self._most = most
        self._first = {path: _sign(_state_of(found)) for path, found in self._found().items()}
        self.paths = tuple(self._first)

    def to_plain(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The states, as plain types, and why the others are not kept."""
        left = [self._most]
        kept: dict[str, Any] = {}
        lost: dict[str, str] = {}
        objects = self._found()
        self.paths = tuple(objects)
        for path, found in objects.items():
            state = _state_of(found)
            try:
                if isinstance(state, Exception):
                    raise plain_contents.CannotBeKeptError(f"raises {type(state).__name__}: {state}")
                plain = plain_contents.keep_state(state, left)
            except plain_contents.CannotBeKeptError as error:
                if self._first.get(path, _ABSENT) != _sign(state):
                    lost[path] = str(error)
                continue
            kept[path] = {"state": plain, "on_device": on_device(state)}
        return kept, lost

    def restore(self, plain: Mapping[str, Any], device: torch.device) -> dict[str, str]:
        """Load what :meth:`to_plain` returned, what was on a GPU onto ``device``; why that was not possible, by path."""
        found = self._found()
        failed: dict[str, str] = {}
        for path, saved in plain.items():
            if path not in found:
                failed[path] = f"there is no such object when training starts, {IN_TIME}"
                continue
            try:
                found[path].load_state_dict(moved(plain_contents.unkept(saved["state"]), device, saved["on_device"]))
            except Exception as error:  # noqa: BLE001  the program may be another one today
                failed[path] = f"its load_state_dict() raises {type(error).__name__}: {error}"
        return failed

    def _found(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        seen = {id(item) for one in self._saved() for item in _with_parts(one)}
        for place, item in held_by(self._holders(), self._not_theirs):
            if has_state(item) and id(item) not in seen:
                seen.add(id(item))
                found[place] = item
        return found


def _with_parts(saved: object) -> Iterator[Any]:
    """With the optimizer that it wraps, say, or the schedules that it is made of."""
    yield saved
    for value in getattr(saved, "__dict__", {}).values():
        yield from (item for _, item in items_of("", value))


def has_state(value: Any) -> bool:
    """Whether ``value`` is such an object."""
    kind = type(value)
    # What can be iterated may be a loader, whose place is not to be changed here.
    methods = is_ordinary(kind) and all(callable(getattr_static(kind, name, None)) for name in _METHODS)
    if not methods or issubclass(kind, OTHERS) or (hasattr(kind, "__iter__") and not _is_filled(kind)):
        return False
    return not any(module_of(base).startswith("lightning.") for base in kind.__mro__)


def _is_filled(kind: type) -> bool:
    return any(callable(getattr_static(kind, name, None)) for name in _FILLED_BY)


def _state_of(value: Any) -> Any:
    try:
        state = value.state_dict()
        deque(leaves(state), maxlen=0)  # it may hold itself
        return state
    except Exception as error:  # noqa: BLE001  whatever a stranger's raises is no reason to end training
        return error


def _sign(state: Any) -> list[Any]:
    if isinstance(state, Exception):
        return [repr(state)]
    large = (torch.Tensor, np.ndarray, np.generic)
    plain = (int, float, bool, str, bytes, type(None))
    return [
        contents.fingerprint(leaf) if isinstance(leaf, large) else leaf if isinstance(leaf, plain) else id(leaf)
        for leaf in leaves(state)
    ]
