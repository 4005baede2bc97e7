"""``manifest.json``: what makes a directory a checkpoint.

It is written last. It lists every file with its size and checksums, carries the run's position and metrics, and a checksum
of itself; whoever reads a valid one knows that all the rest is durable.

Checksums are XXH3-64 (xxhash) of blocks of 16 MiB: as fast as memory, and independent blocks can be read, checked and
used in parallel.
"""

from __future__ import annotations

import errno
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from nemologger import names
from nemologger.disk.there import exists
from nemologger.errors import DamagedCheckpointError
from nemologger.stores.path import is_unknown

FORMAT = 1
BLOCK = 16 << 20


@dataclass(frozen=True)
class FileRecord:
    """One file: its size in bytes, and the checksum of each of its blocks."""

    size: int
    blocks: tuple[str, ...]


def check_unpublished(checkpoint: Path) -> None:
    """Before a file is written into ``checkpoint``, which was begun: let it not be one that somebody else has finished.

    A rank that stood still may find that the others have been started anew meanwhile, and have written the same checkpoint.

    Raises:
        FileExistsError: It is complete.
    """
    if exists(checkpoint / names.MANIFEST):
        raise FileExistsError(
            errno.EEXIST,
            "it is complete already: another run has the directory now, and has written it",
            str(checkpoint),
        )


class Recorder:
    """Passes the parts of a file on, and makes its :class:`FileRecord` on the way."""

    def __init__(self) -> None:
        self._size = 0
        self._blocks: list[str] = []
        self._hasher = xxhash.xxh3_64()

    def over(self, parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
        """``parts``, as they pass by."""
        for part in parts:
            view = memoryview(part).cast("B")
            self._add(view)
            yield view

    def _add(self, view: memoryview) -> None:
        while view:
            room = BLOCK - self._size % BLOCK
            piece, view = view[:room], view[room:]
            self._hasher.update(piece)
            self._size += len(piece)
            if self._size % BLOCK == 0:
                self._blocks.append(self._hasher.hexdigest())
                self._hasher.reset()

    @property
    def record(self) -> FileRecord:
        """Of all that has passed."""
        last = (self._hasher.hexdigest(),) if self._size % BLOCK or not self._size else ()
        return FileRecord(self._size, (*self._blocks, *last))


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        name: The directory it was published as. A copy under another name is somebody's own.
        life: Which line of training it belongs to: a run that goes back to an earlier checkpoint begins the next one.
        origin: The life that began from scratch and has led to it: the others in between went back.
        step: Optimizer steps taken (Lightning's ``global_step``).
        epoch: Epoch it was taken in, from 0.
        epochs_done: Epochs whose last batch was trained.
        consumed_samples: Training samples seen so far, over all ranks.
        time: When it was saved, in seconds since 1970.
        metrics: The metrics of that moment.
        world_size: Ranks that wrote it.
        has_optimizer: Whether training can go on from it.
        owner: Which callback keeps and prunes it: its ``monitor``, ``mode`` and Lightning's state key.
        score: The monitored metric, or None if there was none yet.
        ranked: Whether it competes for the owner's ``save_top_k``.
        last: Whether it is a ``-last`` that stands by itself.
        files: Every other file, by its path inside the checkpoint.
        versions: Of this package, torch, Lightning and Python.
    """

    step: int
    epoch: int
    name: str = ""
    life: int = 0
    origin: int = 0
    epochs_done: int = 0
    consumed_samples: int = 0
    time: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    world_size: int = 1
    has_optimizer: bool = True
    owner: dict[str, str | None] = field(default_factory=dict)
    score: float | None = None
    ranked: bool = False
    last: bool = False
    files: dict[str, FileRecord] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int, int, float]:
        """Newest last: by step, then by samples, then by time, within the latest line of training.

        Where a program steps plain optimizers Lightning counts no steps, and clocks are set back.
        """
        return self.life, self.step, self.consumed_samples, self.time

    def is_finished(self, *, max_steps: int, max_epochs: int | None) -> bool:
        """Whether a run with these limits (Lightning's, -1 is none) has nothing left to train."""
        by_steps = max_steps != -1 and self.step >= max_steps
        return by_steps or (max_epochs is not None and max_epochs != -1 and self.epochs_done >= max_epochs)

    def dumps(self) -> bytes:
        """The file's content."""
        body = {**_plain_floats(asdict(self)), "format": FORMAT, "block_size": BLOCK, "checksum_algorithm": "xxh3_64"}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def loads(content: bytes, where: Path) -> Manifest:
        """Read a manifest.

        Raises:
            DamagedCheckpointError: If it is not one, not whole, or not as it was written.
        """
        try:
            body = json.loads(content)
            checksum = body.pop("checksum")
            if checksum != _checksum(body):
                raise DamagedCheckpointError(
                    f"{where} has changed since it was written: its own checksum does not match"
                )
            if body["format"] > FORMAT:
                raise DamagedCheckpointError(
                    f"{where} has format {body['format']}, this version reads up to {FORMAT}: update nemologger"
                )
            known = {f.name for f in fields(Manifest)}
            values = {key: value for key, value in body.items() if key in known}
            values["files"] = {
                _inside(path): _record(record["size"], record["blocks"]) for path, record in body["files"].items()
            }
            values["metrics"] = {key: float(value) for key, value in body["metrics"].items()}
            values["score"] = None if body["score"] is None else float(body["score"])
            manifest = Manifest(**values)
            _check_kinds(manifest)
        except DamagedCheckpointError:
            raise
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            # Its checksum may be right: whoever edits one by hand, or means harm, can compute it.
            raise DamagedCheckpointError(f"{where} is not a manifest: {type(error).__name__}: {error}") from error
        return manifest


def read(checkpoint: Path) -> Manifest:
    """The manifest of ``checkpoint``.

    Raises:
        DamagedCheckpointError: If there is none, or it is not as it was written.
        OSError: If a store does not say.
    """
    path = checkpoint / names.MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        if is_unknown(path, error):
            raise
        raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return Manifest.loads(content, path)


@cache
def versions() -> dict[str, str]:
    """What wrote a checkpoint. Looked up once: that takes files of all three packages, and some milliseconds."""
    return {
        "nemologger": _version("nemologger"),
        "torch": _version("torch"),
        "lightning": _version("lightning"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    """That of an installed package; of a copy of the sources on the path, which works as well, none is known."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def now() -> float:
    """The time to put into a manifest."""
    return time.time()


def _record(size: int, blocks: list[str]) -> FileRecord:
    if type(size) is not int or size < 0 or len(blocks) != max(-(-size // BLOCK), 1):
        raise ValueError(f"{len(blocks)} checksums do not go with a size of {size!r}")
    return FileRecord(size, tuple(map(str, blocks)))


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise ValueError(f"{path!r} is no path inside a checkpoint")
    return path


def _check_kinds(manifest: Manifest) -> None:
    for one in fields(Manifest):
        kind = _KINDS.get(str(one.type))
        value = getattr(manifest, one.name)
        if kind is not None and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
            raise TypeError(f"{one.name} is {value!r}")


_KINDS: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict[str, str | None]": dict}


def _checksum(body: dict[str, Any]) -> str:
    return str(xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode()))


def _plain_floats(value: Any) -> Any:
    """JSON has no nan and no infinity: those become strings, which ``float`` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_floats(item) for item in value]
    return value
