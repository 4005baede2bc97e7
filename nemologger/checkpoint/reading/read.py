"""Tensors straight from their files into their own memory, in parallel; no second copy, and nothing is unpickled.

That works for what :mod:`~nemologger.checkpoint.writing.write` wrote, on whatever number of ranks. Anything else (files of
NeMo, of torch itself) goes the ordinary way of torch's distributed checkpoint. From an object store it is fetched in blocks
(:mod:`.fetch`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Lock

import torch

from nemologger.checkpoint.manifest import BLOCK, FileRecord
from nemologger.checkpoint.reading.blocks import CheckedFile, Part, reading
from nemologger.checkpoint.reading.fetch import fetch
from nemologger.checkpoint.reading.in_place import Places, fitting
from nemologger.checkpoint.reading.overlaps import Block, Rows, Run, to_read
from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.state.shards import held, local, part_of, sharded_like
from nemologger.checkpoint.state.shares import Piece
from nemologger.checkpoint.state.stage import memory_of
from nemologger.checkpoint.weights import (
    Metadata,
    Payload,
    described,
    payloads,
    read_metadata,
    read_ordinary,
    shapes_in,
)
from nemologger.errors import CheckpointError, DamagedCheckpointError, ModelMismatchError
from nemologger.stores.path import in_store

_THREADS = 4
_OPEN = 64


def read_tensors(
    weights: Path,
    wanted: Callable[[str], bool] = lambda key: True,
    template: Callable[[str, tuple[int, ...]], torch.Tensor | None] = lambda key, sizes: None,
    records: Mapping[str, FileRecord] | None = None,
    into: Places | None = None,
    *,
    verify: bool = True,
    metadata: Metadata | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of ``weights`` under their flat keys.

    Args:
        weights: The directory.
        wanted: Which keys to read; default all.
        template: For a key and the size of its tensor, a tensor that it is to be sharded like; of that, only this rank's
            part is read. None for all of it, on the CPU.
        records: Files of ``weights`` that are to be compared with their checksums on the way.
        into: Live tensors to read into, if they are in files: nothing is written there before all that is wanted has been
            found in files long enough, but what is wrong with the bytes themselves is found too late for that.
        verify: Read all of the files that have ``records``; else the blocks that hold something that is wanted.
        metadata: What ``.metadata`` says, if that has been read: of very many tensors, it takes its time.

    Raises:
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing, cannot be read, or is not as it was written.
    """
    metadata = metadata or read_metadata(weights)
    stored = {key: one for key, one in shapes_in(metadata).items() if wanted(key)}
    places = into(stored) if into is not None and in_store(weights) is None else {}
    # Of those with the same memory only the last one is read.
    behind = {place.data_ptr(): key for key, place in places.items()}
    templates = {
        key: like
        for key, (sizes, _) in stored.items()
        if key not in places and (like := template(key, sizes)) is not None
    }
    blocks = {
        key: _block(weights, key, sizes, dtype, templates.get(key))
        for key, (sizes, dtype) in stored.items()
        if key not in places
    }
    blocks.update((key, Block(places[key], (0,) * places[key].dim())) for key in behind.values())
    read_blocks(weights, blocks, records, verify=verify, live=bool(places), metadata=metadata)
    read = {key: places[key] if key in places else blocks[key].memory for key in stored}
    return {key: sharded_like(one, templates[key]) if key in templates else one for key, one in read.items()}


def read_parts(
    weights: Path, into: Mapping[str, torch.Tensor], records: Mapping[str, FileRecord] | None = None
) -> dict[str, torch.Tensor]:
    """This rank's parts of tensors of ``weights``, on the CPU; of no other is anything read.

    Args:
        weights: The directory.
        into: By flat key, live tensors of the same sizes, plain or sharded. What is here of them is read into where that
            is possible, and returned then. What ``weights`` does not have is left out.
        records: Files of ``weights``; their blocks that hold something of that are compared with their checksums.

    Raises:
        ModelMismatchError: If one has other sizes.
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing, or cannot be read.
    """
    metadata = read_metadata(weights)
    stored = {key: one for key, one in shapes_in(metadata).items() if key in into}
    for key, (sizes, _) in stored.items():
        if sizes != tuple(into[key].shape):
            raise ModelMismatchError(
                f"{weights}: {key.partition('.')[2]} has shape {sizes}, and {tuple(into[key].shape)} is expected"
            )
    here = {key: local(into[key]) for key in stored}
    dtypes = {key: dtype for key, (_, dtype) in stored.items()}
    places = (
        fitting(here, {key: (tuple(here[key].shape), dtypes[key]) for key in here}) if in_store(weights) is None else {}
    )
    blocks = {
        key: Block(places[key], held(into[key], key).offsets)
        if key in places
        else _block(weights, key, tuple(into[key].shape), dtypes[key], into[key])
        for key in stored
    }
    read_blocks(weights, blocks, records, verify=False, live=bool(places), metadata=metadata)
    return {key: block.memory for key, block in blocks.items()}


def read_blocks(
    weights: Path,
    blocks: Mapping[str, Block],
    records: Mapping[str, FileRecord] | None = None,
    *,
    verify: bool = True,
    live: bool = False,
    metadata: Metadata | None = None,
) -> None:
    """Fill ``blocks`` with their parts of the tensors of ``weights``.

    Args:
        weights: The directory.
        blocks: What is to be filled, by flat key.
        records: As in :func:`read_tensors`; so are ``verify`` and ``metadata``.
        verify: See there.
        metadata: See there.
        live: The blocks are in use, so an error is to say that they may hold parts of what could not be read.

    Raises:
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing, cannot be read, or is not as it was written.
    """
    if not blocks and not verify:
        return
    found = payloads(weights, {key: block.box for key, block in blocks.items()}, metadata)
    remote = in_store(weights)
    if remote is not None:
        strange = fetch(remote, found, blocks, records if records and verify else {})
        rest = {key: block for key, block in blocks.items() if key in strange or key not in found}
        _read_ordinary(weights, rest)
    else:
        _read_local(weights, blocks, found, records or {}, verify=verify, live=live)


def _read_local(
    weights: Path,
    blocks: Mapping[str, Block],
    found: Mapping[str, Sequence[Payload]],
    records: Mapping[str, FileRecord],
    *,
    verify: bool,
    live: bool,
) -> None:
    with _Files(weights) as opened, ThreadPoolExecutor(_THREADS, thread_name_prefix="nemologger-read") as pool:
        opened.check_ends(payload for group in found.values() for payload in group)
        with without_collector():
            # A header that is not as expected was written by another torch, or by chance has the same length.
            strange = opened.with_other_headers((payload for group in found.values() for payload in group), records)
            known = {key: group for key, group in found.items() if key not in strange}
            wanted = [one for key, group in known.items() for payload in group for one in to_read(payload, blocks[key])]
            jobs = list(_jobs(opened, wanted, records, verify=verify))
        with _in_use() if live else nullcontext():
            _read_ordinary(weights, {key: block for key, block in blocks.items() if key not in known})
            for _ in pool.map(lambda job: job(), jobs):
                pass


@contextmanager
def _in_use() -> Iterator[None]:
    try:
        yield
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(
            f"{error}\nIt was being read into the model, which may hold parts of it now: build the model anew."
        ) from error


def _block(weights: Path, key: str, sizes: tuple[int, ...], dtype: torch.dtype, template: torch.Tensor | None) -> Block:
    if template is None:
        return Block(_empty(weights, key, sizes, dtype), (0,) * len(sizes))
    part = held(template, key)
    return Block(_empty(weights, key, part.shape.sizes, dtype), part.offsets)


def _empty(weights: Path, key: str, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(sizes, dtype=dtype)
    except RuntimeError as error:  # there is no memory, or no such size
        raise CheckpointError(f"{key} of {weights}, {dtype} of the size {sizes}, cannot be made: {error}") from error


def _read_ordinary(weights: Path, blocks: Mapping[str, Block]) -> None:
    """Read ``blocks`` as DCP does: it reads whole tensors."""
    sizes = described(weights) if blocks else {}
    whole = {
        key: block.memory if sizes[key][0] == tuple(block.memory.shape) else _empty(weights, key, *sizes[key])
        for key, block in blocks.items()
    }
    if whole:
        read_ordinary(weights, whole)
    for key, block in blocks.items():
        if whole[key] is not block.memory:
            piece = Piece(key, block.offsets, tuple(block.memory.shape), block.memory.nbytes)
            block.memory.copy_(part_of(whole[key], piece))


def _jobs(
    files: _Files, wanted: Sequence[Run | Rows], records: Mapping[str, FileRecord], *, verify: bool
) -> Iterator[Callable[[], None]]:
    """What there is to do, in the order of the files: whole blocks of those that have a record, else only what is wanted."""
    by_file: dict[str, list[Run | Rows]] = {}
    for one in sorted(wanted, key=lambda one: one.start):
        by_file.setdefault(one.file, []).append(one)
    for name in sorted({*by_file, *(records if verify else ())}):
        record = records.get(name)
        if record is None:
            yield from map(files.job, by_file[name])
            continue
        parts: list[Part] = []
        numbers = set(range(len(record.blocks)) if verify else ())
        for one in by_file.get(name, ()):
            numbers.update(range(one.start // BLOCK, min(-(-(one.start + one.size) // BLOCK), len(record.blocks))))
            part = Part(one.start, one.target) if isinstance(one, Run) else None
            if part is not None and part.end <= record.size and (not parts or parts[-1].end <= part.start):
                parts.append(part)
            else:
                yield files.job(one)  # not in one run, or nothing of ours: read by itself
        if numbers:
            file = CheckedFile(files.path(name), parts, record)
            yield from (partial(files.check, name, file, number) for number in sorted(numbers))


class _Files:
    """The weights files. A few stay open: of thousands of ranks there are more than a process may have open."""

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._idle: list[tuple[str, int]] = []  # whoever uses one has it for himself
        self._lock = Lock()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        for _, descriptor in self._idle:
            os.close(descriptor)
        self._idle.clear()

    def path(self, file: str) -> Path:
        return self._weights / file

    @contextmanager
    def descriptor(self, file: str) -> Iterator[int]:
        with self._lock:
            at = next((i for i, (name, _) in enumerate(self._idle) if name == file), None)
            descriptor = None if at is None else self._idle.pop(at)[1]
        if descriptor is None:
            with reading(self.path(file)):
                descriptor = os.open(self.path(file), os.O_RDONLY)
        try:
            yield descriptor
        finally:
            with self._lock:
                self._idle.append((file, descriptor))
                surplus = self._idle.pop(0)[1] if len(self._idle) > _OPEN else None
            if surplus is not None:
                os.close(surplus)

    def with_other_headers(self, stored: Iterable[Payload], records: Mapping[str, FileRecord]) -> set[str]:
        """The keys of what does not begin as it should, though its file is what was written, as far as ``records`` say."""
        by_file: dict[str, list[Payload]] = {}
        for one in stored:
            by_file.setdefault(one.file, []).append(one)
        found = set()
        for file, group in by_file.items():
            path, record = self.path(file), records.get(file)
            with self.descriptor(file) as descriptor, reading(path):
                for one in group:
                    start, size = one.header_start, len(one.header)
                    if os.pread(descriptor, size, start) == one.header:
                        continue
                    found.add(one.key)
                    if record is not None and start + size <= record.size:
                        for number in range(start // BLOCK, -(-(start + size) // BLOCK)):
                            CheckedFile(path, (), record).read(descriptor, number)
        return found

    def check_ends(self, stored: Iterable[Payload]) -> None:
        """Find files that end too early, before anything of them is read."""
        ends: dict[str, int] = {}
        for one in stored:
            ends[one.file] = max(ends.get(one.file, 0), one.header_start + len(one.header) + one.piece.nbytes)
        for file, end in ends.items():
            with self.descriptor(file) as descriptor:
                size = os.fstat(descriptor).st_size
            if size < end:
                raise DamagedCheckpointError(f"{self.path(file)} ends at byte {size}, in the middle of a tensor")

    def check(self, name: str, file: CheckedFile, number: int) -> None:
        """Read block ``number`` of the file called ``name``."""
        with self.descriptor(name) as descriptor:
            file.read(descriptor, number)

    def job(self, one: Run | Rows) -> Callable[[], None]:
        """What reads ``one``, in any thread."""
        return partial(self._read, one)

    def _read(self, one: Run | Rows) -> None:
        path = self.path(one.file)
        with self.descriptor(one.file) as descriptor:
            if isinstance(one, Run):
                _fill(descriptor, path, one.start, one.target)
            else:
                rows = one.empty()
                _fill(descriptor, path, one.start, memory_of(rows))
                one.place(rows)


def _fill(descriptor: int, path: Path, position: int, target: memoryview) -> None:
    while target:
        with reading(path):
            count = os.preadv(descriptor, [target], position)
        if count == 0:
            raise DamagedCheckpointError(f"{path} ends at byte {position}, in the middle of a tensor")
        target, position = target[count:], position + count
