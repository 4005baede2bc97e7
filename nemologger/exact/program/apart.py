"""Networks that a program holds where Lightning does not see them: in a list, in an object that is no module, in a callback.

A teacher is often put there so that no optimizer trains it, and an average of the weights is often an object that holds a
copy of them. Such a network is in no checkpoint. One that has changed since training began is kept; of one that has not,
a few numbers say whether the program makes the same in the next life. One that is made later most often belongs to a metric:
the program makes it again when it needs it. So that is left out, unless it is a copy of a part of the model, or changes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import cache
from itertools import chain
from typing import Any

import torch
import xxhash
from torch import nn

from nemologger.exact.program.own_states import IN_TIME
from nemologger.exact.reach.parts import held_by
from nemologger.exact.values import contents, plain_contents
from nemologger.exact.values.tensors import leaves, memory_of, moved, on_device

_LOOKED_AT = 256
#: In a list; of those within it, 32 in each.
_MOST = 1024
_ABSENT = object()
_ANOTHER = "had not changed since training began, so it was not saved, but the program makes another one now"
_FAILED = "was saved, and begins as the program makes it: {}"


class Apart:
    """Networks among the attributes of some objects, or in lists and dictionaries there.

    Args:
        holders: Gives the objects that may hold some, by path.
        model: What Lightning trains and saves.
        not_theirs: For each of the holders, the names of attributes that belong to the framework.
        most: Bytes that are kept at most.
    """

    def __init__(
        self, holders: Callable[[], Mapping[str, object]], model: nn.Module, not_theirs: Collection[str], most: int
    ) -> None:
        self._holders = holders
        self._model = model
        self._not_theirs = not_theirs
        self._most = most
        self._first: dict[str, str] = {}
        self._late: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
        self.begin()

    def begin(self) -> None:
        """The hooks that start training are done: what they have made is there."""
        self._first = {**{path: sign_of(state) for path, (_, state) in self._found().items()}, **self._first}

    def look(self) -> None:
        """For the first steps: what is made in them, and changes, is seen to do so by the first save."""
        for path, (network, state) in self._found().items():
            if path not in self._first:
                self._has_changed(path, network, sign_of(state))

    def _has_changed(self, path: str, network: nn.Module, sign: str) -> bool:
        """Since it was first seen, of one made after training began; it is another thing when it is made anew."""
        if path not in self._late or self._late[path][0]() is not network:
            self._late[path] = weakref.ref(network), sign
        return self._late[path][1] != sign

    def to_plain(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Their states, as plain types, and why some are not kept."""
        left = [self._most]
        kept: dict[str, Any] = {}
        lost: dict[str, str] = {}
        shapes = cache(lambda: _shapes_in(_tensors_of(self._model)))  # a model may have thousands of parts
        for path, (network, state) in self._found().items():
            sign = sign_of(state)
            if self._first.get(path, _ABSENT) == sign:
                kept[path] = {"sign": sign}
                continue
            is_late = path not in self._first
            if is_late and not (self._has_changed(path, network, sign) or _shapes_in(leaves(state)) <= shapes()):
                continue
            try:
                kept[path] = {"state": plain_contents.keep_state(state, left), "on_device": on_device(state)}
            except plain_contents.CannotBeKeptError as error:
                lost[path] = str(error)
        return kept, lost

    def restore(self, plain: Mapping[str, Any], device: torch.device) -> dict[str, str]:
        """Load what :meth:`to_plain` returned, what was on a GPU onto ``device``; what that did not do, by path."""
        found = self._found()
        failed: dict[str, str] = {}
        for path, saved in plain.items():
            network, state = found.get(path, (None, None))
            if "sign" in saved:
                if network is not None and saved["sign"] != sign_of(state):
                    failed[path] = _ANOTHER
            elif network is None:
                failed[path] = _FAILED.format(f"there is no such network when training starts, {IN_TIME}")
            else:
                before = None
                try:
                    before = plain_contents.copied(state)
                    network.load_state_dict(moved(plain_contents.unkept(saved["state"]), device, saved["on_device"]))
                except Exception as error:  # noqa: BLE001  the program may be another one today
                    with suppress(Exception):  # it has loaded what fits, and half of it is worse than nothing
                        network.load_state_dict(before or {})
                    failed[path] = _FAILED.format(f"its load_state_dict() raises {type(error).__name__}: {error}")
        return failed

    def _found(self) -> dict[str, tuple[nn.Module, Any]]:
        """With what they hold."""
        found: dict[str, tuple[nn.Module, Any]] = {}
        seen = {id(part) for part in self._model.modules()}
        saved: set[int] = set()
        for place, item in held_by(self._holders(), self._not_theirs, _MOST):
            if not issubclass(type(item), nn.Module) or id(item) in seen:
                continue
            seen.add(id(item))
            saved = saved or {memory_of(tensor) for tensor in _tensors_of(self._model)}
            try:
                if {memory_of(tensor) for tensor in _tensors_of(item)} <= saved:
                    continue  # another way to the model, or nothing to keep
                state = item.state_dict()
                deque(leaves(state), maxlen=0)  # it may hold itself
            except Exception:  # noqa: BLE001  nobody has called its __init__(), or it is of a class that raises
                continue
            found[place] = item, state
        return found


def _tensors_of(network: nn.Module) -> Iterator[torch.Tensor]:
    return chain(network.parameters(), network.buffers())


def _shapes_in(values: Iterator[Any]) -> set[torch.Size]:
    return {value.shape for value in values if isinstance(value, torch.Tensor) and contents.is_plain(value)}


def sign_of(state: Any) -> str:
    """Some numbers of each tensor: whoever trains or averages weights changes nearly all of them. Equal in every process."""
    digest = xxhash.xxh3_64()
    for tensor in leaves(state):
        if not isinstance(tensor, torch.Tensor):
            continue
        if hasattr(tensor, "to_local"):  # of a sharded one, this rank's part
            tensor = tensor.to_local()
        if not contents.is_plain(tensor):  # it may not even have a shape
            digest.update(type(tensor).__name__.encode())
            continue
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(contents.bytes_of(_some_of(tensor.detach())).tobytes())
    return digest.hexdigest()


def _some_of(tensor: torch.Tensor) -> torch.Tensor:
    step = 1 + tensor.numel() // _LOOKED_AT
    if tensor.is_contiguous():
        return tensor.view(-1)[::step]
    places = torch.arange(0, tensor.numel(), step, device=tensor.device)  # reshape() would copy all of it
    return tensor[torch.unravel_index(places, tensor.shape)]
