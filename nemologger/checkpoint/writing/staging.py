"""Copies the state into the arena while training goes on, up to the moment when the optimizer changes it.

Between two steps of the optimizer, forward and backward read trained parameters and the optimizer's state, and change
buffers; a training step may also write to parameters that no optimizer trains, averages of a teacher for example. So
these, and whatever is small, are copied before training goes on; the rest beside it: on CUDA through a stream of its own,
on the CPU in a thread. Whatever optimizer steps next waits until that is done, wherever it is called from.

Whoever changes a parameter in another way in between (a hook of the model, say) is found out by the version counter that
torch keeps of each tensor; such a save fails. Writing through ``tensor.data`` or from another process cannot be seen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from nemologger.checkpoint.writing.arena import Copy, copy_at_once
from nemologger.errors import SaveFailedError

_SMALL = 64 << 10
_cuda: Any = torch.cuda  # partly without types


class Staging:
    """The copies of one save, under way from the moment that this is made.

    Args:
        copies: What to copy. The tensors are those that training works on.
        may_change: The keys of tensors that the next forward or backward may change.
    """

    def __init__(self, copies: Sequence[Copy], may_change: Collection[str]) -> None:
        at_once = [copy for copy in copies if copy.source.nbytes <= _SMALL or copy.key in may_change]
        chosen = {id(copy) for copy in at_once}
        self._later = [copy for copy in copies if id(copy) not in chosen]
        self._versions = [_version(copy.source) for copy in self._later]
        self._changed = ""
        self._sealed = False
        self._error: Exception | None = None
        self._events: list[tuple[torch.device, Any]] = []
        self._thread: threading.Thread | None = None
        # On CUDA nothing is waited for: what training asks of the device next comes after these in the same stream.
        _enqueue([copy for copy in at_once if copy.source.is_cuda], self._events, beside=False)
        copy_at_once([copy for copy in at_once if not copy.source.is_cuda])
        _enqueue([copy for copy in self._later if copy.source.is_cuda], self._events, beside=True)
        others = [copy for copy in self._later if not copy.source.is_cuda]
        if others:
            self._thread = threading.Thread(target=self._copy, args=(others,), name="nemologger-stage", daemon=True)
            self._thread.start()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    @property
    def done(self) -> bool:
        """Whether all is copied, or never will be; asking does not wait."""
        try:
            return (self._thread is None or not self._thread.is_alive()) and all(e.query() for _, e in self._events)
        except RuntimeError:  # finish() says what it is
            return True

    def hold(self) -> None:
        """Let nothing that comes after this in the calling thread, or on its devices, change what is being copied."""
        if self._sealed:
            return
        self._sealed = True
        if self._thread is not None:
            self._thread.join()
        changed = [
            c.key for c, version in zip(self._later, self._versions, strict=True) if _version(c.source) != version
        ]
        self._changed = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)

    def finish(self) -> None:
        """Return when all is copied.

        Raises:
            SaveFailedError: If it could not be copied, or was changed meanwhile.
        """
        self._hook.remove()  # not in hold(): an optimizer may be going through its hooks
        try:
            self.hold()
            for _, event in self._events:
                event.synchronize()
        except RuntimeError as error:  # of the device, which may be of anything that it was told to do
            self._error = error
        self._later.clear()
        if self._error is not None:
            raise SaveFailedError(f"the state could not be copied: {self._error}") from self._error
        if self._changed:
            raise SaveFailedError(
                f"{self._changed} changed while being copied, and not by an optimizer's step: pass "
                'ModelCheckpoint(staging="at_once")'
            )

    def _copy(self, copies: list[Copy]) -> None:
        try:
            for copy in copies:
                copy.target.copy_(copy.source)
        except Exception as error:  # noqa: BLE001  raised again by finish()
            self._error = error

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before an optimizer steps; ``args`` begins with the optimizer itself."""
        if self._sealed:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self.hold()
            return None

        # The closure is forward and backward, which change nothing; the optimizer goes on when it returns.
        def then_hold(*given: Any, **named: Any) -> Any:
            result = closure(*given, **named)
            self.hold()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_hold}
        return (args[0], then_hold, *args[2:]), kwargs


def _enqueue(copies: list[Copy], events: list[tuple[torch.device, Any]], *, beside: bool) -> None:
    """Ask CUDA devices to copy, and take down the events that say when it is done."""
    for device in {copy.source.device for copy in copies}:
        current = torch.cuda.current_stream(device)
        stream = _stream_beside(device) if beside else current
        if beside:
            stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for copy in copies:
                if copy.source.device == device:
                    copy.target.copy_(copy.source, non_blocking=True)
        events.append((device, stream.record_event()))


@cache
def _stream_beside(device: torch.device) -> Any:
    """The same one for all saves: torch keeps memory for each stream apart, and strided tensors need some."""
    return _cuda.Stream(device)


def comes_to_rest(device: torch.device, seconds: float) -> bool:
    """Whether ``device`` has done what it was told within ``seconds``. It may wait for another rank, for ever."""
    end = time.monotonic() + seconds
    while device.type == "cuda" and not torch.cuda.current_stream(device).query():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001  documented, without a public name
