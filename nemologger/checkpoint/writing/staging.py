"""Copies the state into the arena while training goes on, up to the moment when the optimizer changes it.

Between two steps of the optimizer, forward and backward read trained parameters and the optimizer's state, and change
buffers; a training step may also write to parameters that no optimizer trains, averages of a teacher for example. So
these, and whatever is small, are copied before training goes on; the rest beside it: on CUDA through a stream of its own,
on the CPU in a thread. Whatever optimizer steps next waits until that is done, wherever it is called from.

Whoever changes a parameter in another way in between (a hook of the model, say) is found out by the version counter that
torch keeps of each tensor; such a save fails. Writing through ``tensor.data`` or from another process cannot be seen.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from nemologger.checkpoint.writing.arena import Copy, copy_at_once
from nemologger.errors import SaveFailedError

log = logging.getLogger(__name__)

#: When the state is copied: while training waits, or while it goes on; "auto": as suits the device.
StagingMode = Literal["auto", "at_once", "overlapped"]

_SMALL = 64 << 10
_LOOK_EVERY = 0.002
#: What devices that do not answer may still copy, from where and to where, as long as this process lives.
_LEFT: list[Sequence[Copy]] = []
_cuda: Any = torch.cuda  # partly without types


class Staging:
    """The copies of one save, under way from :meth:`begin` until :meth:`finish` or :meth:`give_up`.

    Args:
        copies: What to copy. The tensors are those that training works on.
        may_change: The keys of tensors that the next forward or backward may change.
    """

    def __init__(self, copies: Sequence[Copy], may_change: Collection[str]) -> None:
        self._copies = copies
        at_once = self._at_once = [copy for copy in copies if copy.source.nbytes <= _SMALL or copy.key in may_change]
        chosen = {id(copy) for copy in at_once}
        self._later = [copy for copy in copies if id(copy) not in chosen]
        self._versions = [_version(copy.source) for copy in self._later]
        self._changed = ""
        self._sealed = False
        self._error: Exception | None = None
        self._events: list[tuple[torch.device, Any]] = []
        self._thread: threading.Thread | None = None
        self._hook: Any = None

    def begin(self) -> None:
        """Ask for the copies, and make those that cannot wait.

        Raises:
            Exception: That failed. Some may be under way: :meth:`give_up` waits for them.
        """
        # On CUDA nothing is waited for: what training asks of the device next comes after these in the same stream.
        _enqueue([copy for copy in self._at_once if copy.source.is_cuda], self._events, beside=False)
        copy_at_once([copy for copy in self._at_once if not copy.source.is_cuda])
        _enqueue([copy for copy in self._later if copy.source.is_cuda], self._events, beside=True)
        others = [copy for copy in self._later if not copy.source.is_cuda]
        if others:
            self._thread = threading.Thread(target=self._copy, args=(others,), name="nemologger-stage", daemon=True)
            self._thread.start()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    @property
    def done(self) -> bool:
        """Whether all is copied, or never will be; asking does not wait."""
        under_way = [event for _, event in self._events if not self._is_over(event)]
        return not under_way and (self._thread is None or not self._thread.is_alive())

    def _is_over(self, event: Any) -> bool:
        try:
            return bool(event.query())
        except RuntimeError as error:  # of the device, which may be of anything that it was told to do
            self._error = self._error or error
            return True

    def wait(self, seconds: float) -> bool:
        """Wait no longer than so until it is :attr:`done`; whether it is. A device may wait for another rank, for ever."""
        end = time.monotonic() + seconds
        while not self.done and time.monotonic() < end:
            time.sleep(_LOOK_EVERY)
        return self.done

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
            try:
                torch.cuda.current_stream(device).wait_event(event)
            except RuntimeError as error:  # the next devices are to wait all the same
                self._error = self._error or error

    def finish(self) -> None:
        """What has become of it, once it is :attr:`done`.

        Raises:
            SaveFailedError: If it could not be copied, or was changed meanwhile.
        """
        self._hook.remove()  # not in hold(): an optimizer may be going through its hooks
        self.hold()
        self._copies = self._later = self._at_once = []
        if self._error is not None:
            raise SaveFailedError(f"the state could not be copied: {self._error}") from self._error
        if self._changed:
            raise SaveFailedError(
                f"{self._changed} changed while being copied, and not by an optimizer's step: pass "
                'ModelCheckpoint(staging="at_once")'
            )

    def give_up(self, seconds: float) -> bool:
        """Wait no longer than so until the memory can be used for something else; whether it can."""
        if self._hook is not None:
            self._hook.remove()
        if self._thread is not None:
            self._thread.join()  # it copies from memory to memory, and waits for nobody
        if self.wait(seconds):
            return True
        log.error(
            "a device has not copied the state within %g s, and may wait for a rank that has stopped: it is not waited for, "
            "and the memory for saves stays as it is",
            seconds,
        )
        _LEFT.append(self._copies)
        return False

    def _copy(self, copies: list[Copy]) -> None:
        try:
            for copy in copies:
                copy.target.copy_(copy.source)
        except Exception as error:  # noqa: BLE001  raised again by finish()
            self._error = self._error or error

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
            try:
                for copy in copies:
                    if copy.source.device == device:
                        copy.target.copy_(copy.source, non_blocking=True)
            finally:  # one that fails, for want of memory say, comes behind others
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
