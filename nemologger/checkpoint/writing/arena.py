"""The image of one rank's weights files, in memory that the writer process sees too.

Laid out once: headers and trailers are filled in, every payload has its place, each file begins on a page. A save copies
the live tensors to their places, which is all that training waits for. The memory is touched when it is made: copying into
fresh memory is six to thirty times slower. The process that writes from it joins its pages to large ones when it is idle.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.state.shards import local
from nemologger.checkpoint.state.shares import Piece
from nemologger.checkpoint.weights import Place
from nemologger.disk.pages import SharedPages
from nemologger.errors import SaveFailedError

log = logging.getLogger(__name__)

_cuda: Any = torch.cuda  # partly without types
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices


@dataclass(frozen=True)
class Image:
    """One file inside the arena: ``size`` bytes from ``offset`` on."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Copy:
    """A piece of a tensor that is to be copied to its place."""

    key: str
    target: torch.Tensor
    source: torch.Tensor


class Arena:
    """Shared memory for the files of one rank.

    Args:
        files: For each file, the places of its pieces.
        tensors: Tensors of the shapes and dtypes that will be saved.

    Raises:
        SaveFailedError: This system cannot share memory so.
    """

    @without_collector()
    def __init__(self, files: Mapping[str, Sequence[Place]], tensors: Mapping[str, torch.Tensor]) -> None:
        self.images: list[Image] = []
        end = 0
        for name, places in files.items():
            size = max((place.end for place in places), default=0)
            self.images.append(Image(name, end, size))
            end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if not hasattr(os, "memfd_create"):
            raise SaveFailedError("saving beside training needs Linux: memory that two processes share by descriptor")
        self.size = max(end, mmap.PAGESIZE)
        self.descriptor = os.memfd_create("nemologger-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, self.size)
            pages = SharedPages(self.descriptor, self.size)
        except OSError:
            os.close(self.descriptor)
            raise
        self._memory = pages.view
        self._is_left = False
        memory = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._pinned: int | None = None
        # FSDP's own tensors do not say where their shards are.
        device = next((here.device for here in map(local, tensors.values()) if here.is_cuda), None)
        #: Whether its pages may be joined from now on: those that a device copies to may not.
        self.may_move = device is None
        self._wanted = threading.Event()
        # Takes a second or two for each GB: training goes on meanwhile.
        self._touching = threading.Thread(
            target=self._touch, args=(pages, device), name="nemologger-arena", daemon=True
        )
        try:
            self._touching.start()
        except RuntimeError:  # there are too many already
            os.close(self.descriptor)
            raise
        self._targets: list[tuple[Piece, torch.Tensor]] = []
        for image, places in zip(self.images, files.values(), strict=True):
            for place in places:
                self._lay(image, place, memory, tensors[place.piece.key].dtype)

    def _lay(self, image: Image, place: Place, memory: torch.Tensor, dtype: torch.dtype) -> None:
        start = image.offset + place.start
        payload = start + len(place.header)
        end = payload + place.piece.nbytes
        self._memory[start:payload] = place.header
        self._memory[end : end + len(place.trailer)] = place.trailer
        if place.piece.nbytes:
            self._targets.append((place.piece, memory[payload:end].view(dtype).view(place.piece.sizes)))

    @property
    def memory(self) -> memoryview:
        """All of it."""
        return self._memory

    @without_collector()
    def copies(self, read: Callable[[Piece], torch.Tensor]) -> list[Copy]:
        """What a save copies, of what ``read`` gives. The places are free: the save before has been written."""
        self._be_ready()
        return [Copy(piece.key, target, _resolved(read(piece))) for piece, target in self._targets]

    def stage(self, read: Callable[[Piece], torch.Tensor]) -> None:
        """Copy what ``read`` gives of this moment to its places, with all threads."""
        copy_at_once(self.copies(read))

    def leave(self) -> None:
        """Stay pinned: a device that does not answer may still copy to the memory, which whoever asked it to keeps."""
        self._is_left = True

    def close(self) -> None:
        """Give the memory back; the writer has closed its own view of it."""
        self._be_ready()
        self._targets.clear()
        if self._pinned is not None and not self._is_left:  # else CUDA would wait for the device
            _cuda.cudart().cudaHostUnregister(self._pinned)
            self._pinned = None
        self._memory = memoryview(b"")
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _be_ready(self) -> None:
        """Wait until the memory is there. That its pages become large ones is not worth waiting for."""
        self._wanted.set()
        self._touching.join()

    def _touch(self, pages: SharedPages, device: torch.device | None) -> None:
        pages.touch()
        if device is not None:
            pages.enlarge(lambda: not self._wanted.is_set())  # now or never: what is pinned stays where it is
            self._pin(pages, device)

    def _pin(self, pages: SharedPages, device: torch.device) -> None:
        """Let the device copy into the memory by itself, beside its work. Without leave to, its copies are slower."""
        try:
            with torch.cuda.device(device):
                error = int(_cuda.cudart().cudaHostRegister(pages.address, pages.size, _PORTABLE))
            why = f"CUDA error {error}" if error else ""
        except Exception as failure:  # noqa: BLE001  of a device, or of a build of torch that lacks something: it is no must
            why = f"{type(failure).__name__}: {failure}"
        if why:
            log.warning("the memory for saves could not be pinned (%s): copying to it is slower", why)
        else:
            self._pinned = pages.address


def _resolved(source: torch.Tensor) -> torch.Tensor:
    """A copy beside the device's work takes the bytes as they are: those of a conjugate view are not its values."""
    return source.resolve_conj().resolve_neg() if source.is_conj() or source.is_neg() else source


def copy_at_once(copies: Sequence[Copy]) -> None:
    """Copy with all threads, and with the devices beside each other; return when all is there."""
    if not copies:
        return  # torch takes no empty list
    targets, sources = [copy.target for copy in copies], [copy.source for copy in copies]
    devices = {source.device for source in sources if source.is_cuda}
    torch._foreach_copy_(targets, sources, non_blocking=bool(devices))  # other accelerators wait by themselves
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
