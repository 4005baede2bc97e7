"""The objects whose attributes are kept: those of the program, and the parts of its module that libraries have made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from nemologger.exact.program.functions import functions_of_schedules
from nemologger.exact.reach.hooks import hooks_of, hooks_of_all
from nemologger.exact.reach.kinds import SCALARS, classes_of_the_program
from nemologger.exact.reach.mentioned import Mentioned
from nemologger.exact.reach.objects import holder_of, within
from nemologger.exact.reach.parts import with_slots
from nemologger.exact.values import contents
from nemologger.exact.values.tensors import memory_of, tensors_in

_ARRAYS = (np.ndarray, np.generic, torch.Tensor)
#: Parts of a module of which everything is in the checkpoint already, or kept in another way.
_WITHOUT_MORE = ("torch.", "torchmetrics.", "lightning.")
#: What the loaders use is kept with them.
_OF_DATA = [f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")]


class Holders:
    """What can be reached from some objects, whenever it is asked for, by path.

    Args:
        roots: The objects by name.
        not_theirs: For each of the holders, the names of attributes that belong to the framework.
        optimizers: Look into their hooks, and those of whichever module or optimizer there is; None for not.
    """

    def __init__(
        self, roots: Mapping[str, object], not_theirs: Collection[str], optimizers: Sequence[Optimizer] | None = None
    ) -> None:
        self._roots = roots
        self._not_theirs = not_theirs
        modules = [root for root in roots.values() if isinstance(root, nn.Module)]
        # A list of parameters or buffers is to hold those of this program, whose values are in the checkpoint.
        self._of_model = {memory_of(t) for module in modules for t in chain(module.parameters(), module.buffers())}
        self._optimizers = optimizers
        self._program: list[tuple[str, Any]] | None = None
        self._modules: list[tuple[str, nn.Module]] | None = None
        self.look_for_hooks()

    def look_for_hooks(self) -> None:
        """See what is hooked into modules: to go through all parameters at each save would take its time."""
        modules = [(path, root) for path, root in self._roots.items() if isinstance(root, nn.Module)]
        self._hooks = [pair for path, module in modules for pair in hooks_of(path, module)]
        self._hooks += () if self._optimizers is None else hooks_of_all(self._optimizers)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While it lasts nothing changes which objects there are: they are looked for once, and asked for many times."""
        self._program, self._modules = list(self._look_in_program()), list(self._look_for_parts())
        try:
            yield
        finally:
            self._program = self._modules = None

    def of_program(self) -> Iterable[tuple[str, Any]]:
        """The objects of the program, and the variables of its files and classes."""
        return self._look_in_program() if self._program is None else self._program

    def _look_in_program(self) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        mentioned = Mentioned(Dataset, Sampler, DataLoader, *_OF_DATA)
        waiting: list[tuple[str, Any]] = list(self._roots.items())
        hooks = [*self._hooks]
        while waiting:
            while waiting:
                path, holder = waiting.pop(0)
                if id(holder) in seen:
                    continue
                seen.add(id(holder))
                if isinstance(holder, FunctionType):
                    mentioned.add(holder)
                for kind in classes_of_the_program(holder):
                    mentioned.add_class(kind)
                holder = holder_of(holder)
                yield path, holder
                own = with_slots(holder)
                inner = {**own, **(own.get("_modules") or {})}
                for name, value in inner.items():
                    if name not in self._not_theirs:
                        waiting += within(f"{path}.{name}", value)
                        waiting += functions_of_schedules(f"{path}.{name}", value)
            waiting, hooks = hooks or [pair for path, value in mentioned.follow() for pair in within(path, value)], []
        yield from mentioned.places()

    def of_libraries(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts of modules that libraries have made."""
        seen = {id(holder) for _, holder in self.of_program()}
        for path, part in self._parts():
            if not f"{type(part).__module__}.".startswith(_WITHOUT_MORE) and id(part) not in seen:
                yield path, part

    def all(self) -> dict[str, Any]:
        """Both."""
        return dict(chain(self.of_program(), self.of_libraries()))

    def with_generators(self) -> dict[str, Any]:
        """Those that may have generators, or objects with a state of their own, among their attributes."""
        parts = {path: part for path, part in self._parts() if not type(part).__module__.startswith("torch.nn.")}
        return dict(self.of_program()) | parts

    def _parts(self) -> Iterable[tuple[str, nn.Module]]:
        return self._look_for_parts() if self._modules is None else self._modules

    def _look_for_parts(self) -> Iterator[tuple[str, nn.Module]]:
        for path, root in self._roots.items():
            if isinstance(root, nn.Module):
                yield from ((f"{path}.{name}", part) for name, part in root.named_modules() if name)

    def named(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The attributes of those of the program."""
        for path, holder in self.of_program():
            yield path, {name: value for name, value in with_slots(holder).items() if name not in self._not_theirs}

    def values(self) -> Iterator[tuple[str, Any]]:
        """The attributes that may be kept: plain ones, and lists, arrays and the like that are not the model's."""
        for holders, is_kept in ((self.of_program(), contents.is_content), (self.of_libraries(), _is_array)):
            for path, holder in holders:
                for name, value in with_slots(holder).items():
                    if name in self._not_theirs:
                        continue
                    holds = is_kept(value) and not is_in(lambda: self._of_model, value)
                    if holds or type(value) in SCALARS:
                        yield f"{path}.{name}", value
                for name, value in unsaved_buffers(holder).items():
                    yield f"{path}.{name}", value


def _is_array(value: Any) -> bool:
    return issubclass(type(value), _ARRAYS)


def is_in(memory: Callable[[], Collection[int]], value: Any) -> bool:
    """Whether a tensor that ``value`` is, or holds, is in ``memory``, which nobody is asked for where there is none."""
    try:
        return any(memory_of(tensor) in memory() for tensor in tensors_in(value))
    except Exception:  # noqa: BLE001  a class of somebody's that does not let others go through it
        return False


def unsaved_buffers(holder: Any) -> dict[str, torch.Tensor]:
    """The buffers that a module does not want to be saved."""
    if not issubclass(type(holder), nn.Module):
        return {}
    names = getattr(holder, "_non_persistent_buffers_set", ())  # nobody may have called its __init__()
    found = {name: holder._buffers.get(name) for name in sorted(names)}  # noqa: SLF001
    return {name: buffer for name, buffer in found.items() if buffer is not None}
