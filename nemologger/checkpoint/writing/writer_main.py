"""The writer process: writes the arena's files, outside the interpreter lock of the process that trains.

It is started by :class:`~nemologger.checkpoint.writing.writer.Writer` and imports no torch. It publishes nothing: that is
rank 0's, when all ranks' writers are done. It ends with the process that started it, in the middle of a file if need be: the
next run may be there already, and write to the same place.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event

from nemologger.checkpoint.manifest import FileRecord, Recorder, check_unpublished
from nemologger.checkpoint.writing.reports import dumps
from nemologger.disk import LocalDisk
from nemologger.disk.pages import LARGE, SharedPages
from nemologger.stores.store import Store

#: What is said before memory is filled for a job: nothing is to be done with it meanwhile.
STAND_BY = "stand by"

# The least that still makes progress beside processes that keep every core busy.
_NICE = 19
_UPLOADS = 4
_TOLD_EVERY = 1.0  # seconds
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_LOWEST_BEST_EFFORT = (2 << 13) | 7
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """One save of one rank.

    Attributes:
        directory: The checkpoint.
        images: For each file of the arena, its path below the checkpoint, its offset in the arena, and its size.
        small: Other files, by their path below the checkpoint, that are not the same in every job.
        store: What ``directory`` is a URL of; None is the local file system.
        report: Where to tell rank 0, which cannot hear this process, that all is written; "" for nowhere.
    """

    directory: str
    images: tuple[tuple[str, int, int], ...]
    small: dict[str, bytes]
    store: Store | None = None
    report: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        records: Every file that was written, durably, by its path below the checkpoint.
        error: What went wrong, or "".
        details: The traceback of it.
    """

    records: dict[str, FileRecord]
    error: str = ""
    details: str = ""


def perform(job: Job, arena: memoryview, always: Mapping[str, bytes]) -> Outcome:
    """Write what ``job`` says, and the files of ``always``. Whatever goes wrong is in the outcome."""
    job = replace(job, small={**always, **job.small})
    try:
        outcome = Outcome(_write(job, arena) if job.store is None else upload(job.store, job, arena))
    except Exception as error:  # noqa: BLE001  it travels to the process that trains
        return Outcome({}, f"{type(error).__name__}: {error}", traceback.format_exc())
    if job.report:
        with contextlib.suppress(OSError):  # the process that trains hears it all the same
            content = [dumps(outcome.records)]
            if job.store is None:
                LocalDisk().write(Path(job.report), content)
            else:
                job.store.write(job.report, content, create=True)
    return outcome


def upload(store: Store, job: Job, arena: memoryview) -> dict[str, FileRecord]:
    """As for the local file system, into a store: the files side by side, and each in parts side by side.

    When the process that trains is killed, this one goes on for a while. By then another run may write the same checkpoint:
    what is there already is left alone.
    """
    with memoryview(arena) as memory:
        contents = {name: memory[offset : offset + size] for name, offset, size in job.images}
        contents.update({name: memoryview(content) for name, content in job.small.items()})

        def put(name: str) -> FileRecord:
            recorder = Recorder()
            store.write(f"{job.directory}/{name}", recorder.over([contents[name]]), create=True)
            return recorder.record

        with ThreadPoolExecutor(_UPLOADS, thread_name_prefix="nemologger-upload") as pool:
            records = dict(zip(contents, pool.map(put, contents), strict=True))
        for content in contents.values():
            content.release()
    return records


def _write(job: Job, arena: memoryview) -> dict[str, FileRecord]:
    disk, directory = LocalDisk(), Path(job.directory)
    records: dict[str, FileRecord] = {}
    with ThreadPoolExecutor(1) as pool:
        for name, offset, size in job.images:
            check_unpublished(directory)
            image = arena[offset : offset + size]
            padded = arena[offset : offset - (-size // mmap.PAGESIZE) * mmap.PAGESIZE]
            writing = pool.submit(disk.write_image, directory / name, padded, size)
            records[name] = _record(image)  # reads the memory that is being written
            writing.result()
    for name, content in job.small.items():
        check_unpublished(directory)
        path = directory / name
        disk.make_directory(path.parent)
        disk.write(path, [content])
        records[name] = _record(memoryview(content))
    for parent in sorted({(directory / name).parent for name in records}, reverse=True):
        disk.sync(parent)
    return records


def _written(job: Job) -> int:
    """Bytes of the large files of ``job`` that are on disk."""
    total = 0
    for name, _, _ in job.images:
        path = Path(job.directory, name)
        for file in (path, path.with_name(f".{path.name}.partial")):
            with contextlib.suppress(OSError):  # it is renamed between one look and the next
                total += file.stat().st_size
                break
    return total


def _record(content: memoryview) -> FileRecord:
    recorder = Recorder()
    for _ in recorder.over([content]):
        pass
    return recorder.record


def _step_back() -> None:
    """Leave processor and disk to the process that trains."""
    with contextlib.suppress(OSError):  # a service may not be allowed to
        os.nice(_NICE)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, 1, 0, _LOWEST_BEST_EFFORT)


def _end_with(parent: int) -> None:
    """Have the kernel end this process when ``parent`` ends; elsewhere than on Linux it ends after the job under way."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was faster
        sys.exit(1)


@contextlib.contextmanager
def _telling(connection: Connection, job: Job) -> Iterator[None]:
    """Say now and then how many bytes are written: the process that trains does not ask a disk, which may hang.

    Who uploads knows whether the store answers, and says each time that it is there; of a disk only what is new is said.
    """
    done = Event()
    before = job.store.sent if job.store is not None else 0

    def tell() -> None:
        told = 0
        while not done.wait(_TOLD_EVERY):
            written = job.store.sent - before if job.store is not None else _written(job)
            if written == told and job.store is None:
                continue
            if select.select((), (connection,), (), 0)[1]:  # else nobody has listened for hours
                connection.send(told := written)

    with ThreadPoolExecutor(1, thread_name_prefix="nemologger-tell") as beside:
        beside.submit(tell)
        try:
            yield
        finally:
            done.set()


def main(channel: int, descriptor: int, size: int, parent: int, may_join: bool) -> None:
    """Perform jobs until told to stop, or until the other end is closed.

    While there is nothing else to do it joins the arena's pages to large ones: from those a file is written twice as fast.

    Args:
        channel: The descriptor that jobs come in by, and outcomes go out.
        descriptor: Of the arena.
        size: Of the arena, in bytes.
        parent: The process that trains.
        may_join: Whether the arena's pages may be moved.
    """
    _end_with(parent)
    connection = Connection(channel)
    _step_back()
    pages = SharedPages(descriptor, size)
    arena = pages.view
    os.close(descriptor)
    apart = iter(range(0, size // LARGE * LARGE, LARGE) if may_join else ())
    try:
        connection.send(os.getpid())
        always = connection.recv()
        while True:
            while not connection.poll() and (start := next(apart, None)) is not None:
                pages.join(start)
            job = connection.recv()
            while job == STAND_BY:
                job = connection.recv()
            if job is None:
                return
            with _telling(connection, job):
                outcome = perform(job, arena, always)
            connection.send(outcome)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
