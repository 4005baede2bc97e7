"""Is every byte of a checkpoint the one that was written? (contract C3)"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import BLOCK, FileRecord
from nemologger.errors import DamagedCheckpointError

_THREADS = 4


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a checkpoint.

    Attributes:
        file: Its path inside the checkpoint.
        what: Expected and found.
    """

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def problems(
    checkpoint: Path, *, deep: bool = True, shallow: Callable[[str], bool] = lambda file: False
) -> list[Problem]:
    """Everything that is wrong with ``checkpoint``; empty if it is whole.

    Args:
        checkpoint: A directory that nemologger wrote.
        deep: Read every byte and compare checksums; else only look at sizes.
        shallow: Files, by their path inside the checkpoint, whose size is enough: somebody else reads them.
    """
    try:
        manifest = manifests.read(checkpoint)
    except DamagedCheckpointError as error:
        return [Problem("manifest.json", str(error))]
    found = {file: _size_problem(checkpoint / file, record) for file, record in manifest.files.items()}
    if deep:
        whole = [file for file, what in found.items() if what is None and not shallow(file)]
        with ThreadPoolExecutor(_THREADS) as pool:
            checked = pool.map(lambda file: _checksum_problem(checkpoint / file, manifest.files[file]), whole)
            found.update(zip(whole, checked, strict=True))
    return [Problem(file, what) for file, what in found.items() if what is not None]


def _size_problem(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if size == record.size else f"has {size} bytes, {record.size} were written"


def _checksum_problem(path: Path, record: FileRecord) -> str | None:
    try:
        with path.open("rb", buffering=0) as file:
            for number, expected in enumerate(record.blocks):
                block = file.read(BLOCK)
                while len(block) < BLOCK and (more := file.read(BLOCK - len(block))):
                    block += more
                if xxhash.xxh3_64_hexdigest(block) != expected:
                    start = number * BLOCK
                    return f"its bytes {start} to {start + len(block) - 1} have changed since they were written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None
