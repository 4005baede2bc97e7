"""The writer process ends with the process that started it, and publishes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path

import psutil
import pytest
import torch
from processes import python

from nemologger.checkpoint.manifest import FileRecord
from nemologger.checkpoint.state.shares import Piece
from nemologger.checkpoint.weights import lay_out
from nemologger.checkpoint.writing import writer as writer_module
from nemologger.checkpoint.writing.arena import Arena
from nemologger.checkpoint.writing.writer import Writer
from nemologger.checkpoint.writing.writer_main import Job, perform
from nemologger.disk.pages import LARGE, SharedPages
from nemologger.errors import SaveFailedError
from nemologger.names import MANIFEST

PARENT = """
import torch, time
from nemologger.checkpoint.writing.arena import Arena
from nemologger.checkpoint.writing.writer import Writer
arena = Arena({}, {})
writer = Writer(arena, {})
writer.begins(60.0)
print(writer.pid, flush=True)
time.sleep(60)
"""

FORKS = """
import os, sys
from nemologger.checkpoint.writing.arena import Arena
from nemologger.checkpoint.writing.writer import Writer
from nemologger.checkpoint.writing.writer_main import Job
arena = Arena({}, {})
writer = Writer(arena, {})
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
writer.submit(Job(sys.argv[1], (), {"small": b"small"}))
assert writer.outcome(None).error == ""
"""


@pytest.fixture
def arena():
    tensors = {"w": torch.arange(10.0)}
    arena = Arena({"file": lay_out([Piece("w", (0,), (10,), 40)], tensors)}, tensors)
    arena.stage(lambda piece: tensors[piece.key])
    yield arena
    arena.close()


def _gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def _job(arena: Arena, directory: Path) -> Job:
    return Job(str(directory), tuple((i.name, i.offset, i.size) for i in arena.images), {"deep/er/small": b"small"})


def test_it_writes_what_it_is_told_and_records_it(arena, tmp_path):
    with closing(Writer(arena, {"deep/always": b"the same"})) as writer:
        (tmp_path / "earlier").mkdir()
        writer.submit(_job(arena, tmp_path / "earlier"))
        assert writer.outcome(None) is not None
        assert (tmp_path / "earlier/deep/always").read_bytes() == b"the same"
        writer.submit(_job(arena, tmp_path))
        outcome = writer.outcome(None)
        assert outcome is not None
        assert outcome.error == ""
        assert set(outcome.records) == {"file", "deep/er/small", "deep/always"}
        assert (tmp_path / "deep/always").read_bytes() == b"the same"
        assert outcome.records["deep/er/small"] == FileRecord(5, outcome.records["deep/er/small"].blocks)
        assert (tmp_path / "file").stat().st_size == outcome.records["file"].size
    assert _gone(writer.pid)


def _joined(writer: Writer) -> int:
    """Bytes of shared memory that the process sees in large pages."""
    lines = Path(f"/proc/{writer.pid}/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemPmdMapped"))


def test_with_nothing_else_to_do_it_joins_the_pages(tmp_path):
    tensors = {"w": torch.randn(3 * LARGE // 4)}
    piece = Piece("w", (0,), tuple(tensors["w"].shape), tensors["w"].nbytes)
    arena = Arena({"file": lay_out([piece], tensors)}, tensors)
    writer = Writer(arena, {})
    try:
        writer.stand_by()
        arena.stage(lambda piece: tensors[piece.key])
        before = bytes(arena.memory)
        writer.submit(_job(arena, tmp_path))
        outcome = writer.outcome(None)
        end = time.monotonic() + 60
        while _joined(writer) < 3 * LARGE and time.monotonic() < end:
            time.sleep(0.01)
        if not _joined(writer) and not SharedPages(arena.descriptor, arena.size).join(0):
            pytest.skip("this kernel joins no shared pages")
        assert _joined(writer) == 3 * LARGE
        assert bytes(arena.memory) == before
        writer.stand_by()
        writer.submit(_job(arena, tmp_path))
        assert writer.outcome(None) == outcome
    finally:
        writer.close()
        arena.close()


def test_what_goes_wrong_comes_back_with_its_traceback(arena, tmp_path):
    (tmp_path / "file").mkdir()
    with closing(Writer(arena, {})) as writer:
        writer.submit(_job(arena, tmp_path))
        outcome = writer.outcome(None)
        assert outcome is not None
        assert "IsADirectoryError" in outcome.error
        assert "write_image" in outcome.details


def test_its_death_is_an_error_that_says_so(arena, tmp_path):
    writer = Writer(arena, {})
    os.kill(writer.pid, signal.SIGKILL)
    assert _gone_or_zombie(writer)
    with pytest.raises(SaveFailedError, match=r"has died \(exit code -9\)"):
        _perform(writer, _job(arena, tmp_path))
    writer.close()


def test_signals_to_all_processes_of_a_job_do_not_end_it(arena, tmp_path):
    """``--signal`` of Slurm, a preemption, Ctrl-C: the process that trains wants to save then."""
    with closing(Writer(arena, {})) as writer:
        writer.submit(_job(arena, tmp_path))
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(writer.pid, number)
        outcome = writer.outcome(None)
        assert outcome is not None
        assert outcome.error == ""
        assert writer.alive
    assert _gone(writer.pid)


def test_one_that_hangs_up_and_is_still_there_is_ended(arena, tmp_path, monkeypatch):
    """What it waits for in the kernel may keep it longer than its connection."""
    monkeypatch.setattr(writer_module, "_END_TIMEOUT", 0.2)
    writer = Writer(arena, {})
    with writer._connection:  # it has it until the end
        writer._connection, other = Pipe()
        other.close()
        with pytest.raises(SaveFailedError, match="has hung up, did not end within"):
            writer.submit(_job(arena, tmp_path))
    assert not writer.alive
    assert _gone(writer.pid)


def test_one_that_does_not_end_is_killed_and_that_is_said(arena, monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "_END_TIMEOUT", 0.2)
    writer = Writer(arena, {})
    os.kill(writer.pid, signal.SIGSTOP)
    writer.close()
    assert f"the writer process {writer.pid} did not end within 0.2 s: it is killed" in caplog.text
    assert _gone(writer.pid)


def _perform(writer: Writer, job: Job) -> None:
    writer.submit(job)
    writer.outcome(None)


def _gone_or_zombie(writer: Writer) -> bool:
    end = time.monotonic() + 20
    while writer.alive and time.monotonic() < end:
        time.sleep(0.01)
    return not writer.alive


@pytest.mark.parametrize("at_work", [False, True])
def test_it_ends_when_the_process_that_trains_is_killed(at_work):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    try:
        if at_work:  # it does not look up from its files, and the next run may want to write the same ones
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
        assert _gone(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_nothing_is_written_into_what_is_complete(arena, tmp_path):
    """It stood still, and a run that was started anew has made that checkpoint meanwhile."""
    (tmp_path / MANIFEST).touch()
    job = replace(_job(arena, tmp_path), report=str(tmp_path / "report"))
    assert "FileExistsError: [Errno 17] it is complete already" in perform(job, arena.memory, {}).error
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_it_tells_rank_0_through_the_file_system_when_all_is_there(arena, tmp_path):
    job = replace(_job(arena, tmp_path), report=str(tmp_path / "report"))
    outcome = perform(job, arena.memory, {})
    told = json.loads((tmp_path / "report").read_text())
    assert {name: FileRecord(r["size"], tuple(r["blocks"])) for name, r in told.items()} == outcome.records
    (tmp_path / "report").unlink()
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    assert "IsADirectoryError" in perform(job, arena.memory, {}).error
    assert not (tmp_path / "report").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="priorities as Linux has them")
def test_it_leaves_processor_and_disk_to_the_process_that_trains(arena):
    with closing(Writer(arena, {})) as writer:
        assert writer.begins(60.0)
        process = psutil.Process(writer.pid)
        assert process.nice() == 19
        assert tuple(process.ionice()) == (psutil.IOPRIO_CLASS_BE, 7)


#: As a service with ``SystemCallFilter=~@resources``: a filter of four instructions refuses one call of the system.
WITHOUT_PRIORITIES = """
import ctypes, os, platform, struct
number = {"x86_64": 141, "aarch64": 140}[platform.machine()]
code = b"".join(struct.pack("HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)))
instructions = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HP", 4, ctypes.addressof(instructions)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
try:
    os.nice(1)
except PermissionError:
    pass
else:
    raise SystemExit("not refused")
from nemologger.checkpoint.writing.arena import Arena
from nemologger.checkpoint.writing.writer import Writer
writer = Writer(Arena({}, {}), {})
assert writer.begins(60.0)
writer.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="filters as Linux has them")
def test_it_works_where_nobody_may_lower_a_priority():
    subprocess.run([sys.executable, "-c", WITHOUT_PRIORITIES], check=True)


def test_a_file_beside_it_that_is_called_like_a_module_of_python_is_not_run(arena, tmp_path, monkeypatch):
    for name in ("platform", "json", "xxhash", "nemologger"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    Writer(arena, {}).close()


def test_a_forked_process_that_ends_does_not_end_it(tmp_path):
    (tmp_path / "forks.py").write_text(FORKS)
    python(tmp_path / "forks.py", tmp_path)
    assert (tmp_path / "small").read_bytes() == b"small"
