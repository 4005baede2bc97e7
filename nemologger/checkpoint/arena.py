"""The image of one rank's weights files, in memory that the writer process sees too.

Laid out once: headers and trailers are filled in, every payload has its place, each file begins on a page. A save copies
the live tensors to their places, which is all that training waits for. The memory is touched when it is made: copying into
fresh memory is six to thirty times slower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemologger.checkpoint.shares import Piece
from nemologger.checkpoint.weights import Place
from nemologger.errors import SaveFailedError

_MADV_POPULATE_WRITE = 23  # Linux 5.14


@dataclass(frozen=True)
class Image:
    """One file inside the arena: ``size`` bytes from ``offset`` on."""

    name: str
    offset: int
    size: int


class Arena:
    """Shared memory for the files of one rank.

    Args:
        files: For each file, the places of its pieces.
        tensors: Tensors of the shapes and dtypes that will be saved.

    Raises:
        SaveFailedError: This system cannot share memory so.
    """

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
        os.ftruncate(self.descriptor, self.size)
        self._map = mmap.mmap(self.descriptor, self.size)
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        # Takes a second for each GB or two: training goes on meanwhile.
        self._touching = threading.Thread(target=_touch, args=(memory,), name="nemologger-arena", daemon=True)
        self._touching.start()
        self._targets: list[tuple[Piece, torch.Tensor]] = []
        for image, places in zip(self.images, files.values(), strict=True):
            for place in places:
                self._lay(image, place, memory, tensors[place.piece.key].dtype)

    def _lay(self, image: Image, place: Place, memory: torch.Tensor, dtype: torch.dtype) -> None:
        start = image.offset + place.start
        payload = start + len(place.header)
        end = payload + place.piece.nbytes
        self._map[start:payload] = place.header
        self._map[end : end + len(place.trailer)] = place.trailer
        if place.piece.nbytes:
            self._targets.append((place.piece, memory[payload:end].view(dtype).view(place.piece.sizes)))

    @property
    def memory(self) -> mmap.mmap:
        """All of it."""
        return self._map

    def stage(self, read: Callable[[Piece], torch.Tensor]) -> None:
        """Copy what ``read`` gives of this moment to its places, with all threads."""
        self._touching.join()
        sources = [read(piece) for piece, _ in self._targets]
        torch._foreach_copy_([target for _, target in self._targets], sources)

    def close(self) -> None:
        """Give the memory back; the writer has closed its own view of it."""
        self._touching.join()
        self._targets.clear()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _touch(memory: torch.Tensor) -> None:
    """Have the kernel give every page of ``memory`` now. Without leave to ask for it, the first save is slower."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), _MADV_POPULATE_WRITE)
