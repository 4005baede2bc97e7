"""Is every byte of a checkpoint the one that was written? (contract C3)

Ranks may share the work: what each looks at depends on nothing but the manifest, its number and how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import xxhash

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import BLOCK, FileRecord, Manifest
from nemologger.errors import DamagedCheckpointError
from nemologger.stores.path import is_unknown

_THREADS = 4
_BLOCKS_AT_ONCE = 4
_PACE = 5.0  # seconds between two signs of life
_LOOKED_AT_AGAIN = 16


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a checkpoint.

    Attributes:
        file: Its path inside the checkpoint.
        what: Expected and found.
        block: Which block of it has another checksum, from 0; None if it is something else.
    """

    file: str
    what: str
    block: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class _Unit:
    """What is looked at in one go: the size of a file, and the checksums of some of its blocks."""

    file: str
    record: FileRecord
    blocks: range

    @property
    def nbytes(self) -> int:
        """How much there is to read."""
        end = min(self.blocks.stop * BLOCK, self.record.size)
        return max(end - self.blocks.start * BLOCK, 0) if self.blocks else 0


def problems(
    checkpoint: Path, *, deep: bool = True, shallow: Callable[[str], bool] = lambda file: False
) -> list[Problem]:
    """Everything that is wrong with ``checkpoint``; empty if it is whole.

    Args:
        checkpoint: A directory that nemologger wrote.
        deep: Read every byte and compare checksums; else only look at sizes.
        shallow: Files, by their path inside the checkpoint, whose size is enough: somebody else reads them.
    """
    looking = verifying(checkpoint, deep=deep, shallow=shallow)
    while True:
        try:
            next(looking)
        except StopIteration as end:
            found: list[Problem] = end.value
            return found


def verifying(
    checkpoint: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    deep: bool = True,
    shallow: Callable[[str], bool] = lambda file: False,
) -> Generator[int, None, list[Problem]]:
    """As :func:`problems`, what ``rank`` of ``world_size`` has to do for that; :func:`merged` is what all have found.

    Args:
        checkpoint: A directory that nemologger wrote.
        rank: Who looks.
        world_size: How many share the work.
        deep: As in :func:`problems`; so is ``shallow``.
        shallow: See there.

    Yields:
        Every few seconds, how many bytes there are still to read; nothing while the storage does not answer.
    """
    try:
        manifest = manifests.read(checkpoint)
    except DamagedCheckpointError as error:
        return [Problem(names.MANIFEST, str(error))]
    units = [unit for file in manifest.files for unit in _units(manifest, file, deep=deep and not shallow(file))]
    mine = units[len(units) * rank // world_size : len(units) * (rank + 1) // world_size]
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="nemologger-verify")
    try:
        futures = {pool.submit(_look, checkpoint, unit): unit for unit in mine}
        pending = set(futures)
        while pending:
            read, pending = wait(pending, timeout=_PACE)
            if read and pending:
                yield sum(futures[future].nbytes for future in pending)
        return merged([[problem] for future in futures if (problem := future.result()) is not None])
    finally:
        pool.shutdown(cancel_futures=True)


def first_problem(checkpoint: Path, manifest: Manifest, files: Iterable[str]) -> Problem | None:
    """What is wrong with some of the files that ``manifest`` lists, read one after the other; None if nothing."""
    units = (unit for file in files for unit in _units(manifest, file, deep=True))
    return next((problem for unit in units if (problem := _look(checkpoint, unit)) is not None), None)


def merged(found: Iterable[Iterable[Problem]]) -> list[Problem]:
    """What all ranks have found, in their order: of each file, what comes first."""
    first: dict[str, Problem] = {}
    for problem in (problem for share in found for problem in share):
        first.setdefault(problem.file, problem)
    return list(first.values())


def are_seen(checkpoint: Path, found: Iterable[Problem]) -> bool:
    """Whether any of what others have ``found`` is seen from here too; of many, the first few are looked at.

    If not, it is not the checkpoint that is damaged: others do not read what is there.
    """
    try:
        manifest = manifests.read(checkpoint)
    except DamagedCheckpointError:
        return True
    for problem in [one for one in found if one.file in manifest.files][:_LOOKED_AT_AGAIN]:
        blocks = range(0) if problem.block is None else range(problem.block, problem.block + 1)
        if _look(checkpoint, _Unit(problem.file, manifest.files[problem.file], blocks)) is not None:
            return True
    return False


def _units(manifest: Manifest, file: str, *, deep: bool) -> list[_Unit]:
    record = manifest.files[file]
    if not deep:
        return [_Unit(file, record, range(0))]
    blocks = range(len(record.blocks))
    return [_Unit(file, record, blocks[i : i + _BLOCKS_AT_ONCE]) for i in range(0, len(blocks), _BLOCKS_AT_ONCE)]


def _look(checkpoint: Path, unit: _Unit) -> Problem | None:
    path = checkpoint / unit.file
    what = _size_problem(path, unit.record)
    if what is not None or not unit.blocks:
        return None if what is None else Problem(unit.file, what)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(unit.blocks.start * BLOCK)
            for number in unit.blocks:
                block = file.read(BLOCK)
                while len(block) < BLOCK and (more := file.read(BLOCK - len(block))):
                    block += more
                if xxhash.xxh3_64_hexdigest(block) != unit.record.blocks[number]:
                    start = number * BLOCK
                    what = f"its bytes {start} to {start + len(block) - 1} have changed since they were written"
                    return Problem(unit.file, what, number)
    except OSError as error:
        if is_unknown(path, error):
            raise
        return Problem(unit.file, f"cannot be read: {error.strerror}")
    return None


def _size_problem(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        if is_unknown(path, error):
            raise
        return f"cannot be read: {error.strerror}"
    return None if size == record.size else f"has {size} bytes, {record.size} were written"
