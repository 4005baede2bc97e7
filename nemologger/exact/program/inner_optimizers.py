"""Optimizers within others, as sharpness-aware minimization has them: the outer one moves the weights, the inner one steps.

The ``state_dict()`` that torch gives the outer one knows nothing of the inner one's momentum, and to load it parts what the
two have shared: a schedule then changes the learning rate of the outer one alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from nemologger.exact.reach.parts import items_of
from nemologger.exact.values import plain_contents

_MAY_SHARE = ("state", "param_groups")


class InnerOptimizers:
    """Those within ``optimizers``, where the outer one does not save them itself.

    Args:
        optimizers: What Lightning steps and saves.
        most: Bytes that are kept at most.
    """

    def __init__(self, optimizers: Sequence[Optimizer], most: int) -> None:
        self._optimizers = optimizers
        self._most = most

    def to_plain(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Their states, as plain types, and why some are not kept."""
        left = [self._most]
        kept: dict[str, Any] = {}
        lost: dict[str, str] = {}
        for path, outer, inner in self._found():
            try:
                shared = [name for name in _MAY_SHARE if getattr(outer, name) is getattr(inner, name)]
                state = None if "state" in shared else inner.state_dict()
                kept[path] = {"shared": shared, "state": plain_contents.keep_state(state, left)}
            except plain_contents.CannotBeKeptError as error:
                lost[path] = str(error)
            except Exception as error:  # noqa: BLE001  whatever a stranger's raises is no reason to end training
                lost[path] = f"cannot be read ({type(error).__name__}: {error})"
        return kept, lost

    def restore(self, plain: Mapping[str, Any]) -> dict[str, str]:
        """Load what :meth:`to_plain` returned; what could not be, by path."""
        failed: dict[str, str] = {}
        for path, outer, inner in self._found():
            saved = plain.get(path)
            if saved is None:
                continue
            try:
                if saved["state"] is not None:
                    inner.load_state_dict(plain_contents.unkept(saved["state"]))
                for name in saved["shared"]:
                    setattr(inner, name, getattr(outer, name))
            except Exception as error:  # noqa: BLE001  the program may be another one today
                failed[path] = f"its load_state_dict() raises {type(error).__name__}: {error}"
        return failed

    def _found(self) -> Iterator[tuple[str, Optimizer, Optimizer]]:
        seen = {id(optimizer) for optimizer in self._optimizers}
        for i, outer in enumerate(self._optimizers):
            if type(outer).state_dict is not Optimizer.state_dict:
                continue
            for name, value in vars(outer).items():
                for path, inner in items_of(f"optimizer {i}.{name}", value):
                    if issubclass(type(inner), Optimizer) and id(inner) not in seen:
                        seen.add(id(inner))
                        yield path, outer, inner
