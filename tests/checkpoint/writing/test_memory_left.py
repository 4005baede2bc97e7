"""What is left, as the kernel tells it; and what happens to saves that do not fit."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from helpers.engine import snapshot_of

from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing import memory_left as memory_left_module
from nemologger.checkpoint.writing.async_saver import AsyncSaver
from nemologger.checkpoint.writing.memory_left import check_memory, given_back, memory_left
from nemologger.disk import LocalDisk
from nemologger.errors import SaveFailedError
from nemologger.ranks import SingleProcess

MB = 1 << 20
MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8192 kB\nSwapFree: 1024 kB\n"}
IN_V2 = {
    "proc/self/cgroup": "0::/job/task\n",
    "sys/fs/cgroup/job/task/memory.max": "max\n",
    "sys/fs/cgroup/job/memory.max": str(6 * MB),
    "sys/fs/cgroup/job/memory.current": str(5 * MB),
    "sys/fs/cgroup/job/memory.stat": f"anon {3 * MB}\ninactive_file {MB}\nactive_file {MB}\n",
}
IN_V1 = {  # the path is the host's, which a container does not see
    "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * MB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(5 * MB),
    "sys/fs/cgroup/memory/memory.stat": f"active_file 7\ntotal_active_file {MB}\n",
}
NO_LIMIT = {**IN_V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ({}, None),
        (MEMINFO, 9 * MB),
        ({**MEMINFO, **IN_V2}, 3 * MB),
        ({**MEMINFO, **IN_V1}, MB),
        ({**MEMINFO, **NO_LIMIT}, 9 * MB),
    ],
)
def test_the_tightest_of_machine_and_control_groups_counts(tmp_path, told, left):
    assert min(memory_left(_root(tmp_path, told)).values(), default=None) == left


def _root(directory: Path, told: dict[str, str]) -> Path:
    for name, content in told.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return directory


@pytest.mark.parametrize(("arena", "is_apart", "fits"), [(3, True, True), (3, False, False), (5, True, False)])
def test_ranks_of_a_host_add_up_where_they_share_a_limit(tmp_path, monkeypatch, arena, is_apart, fits):
    """Each may have a container of its own, of 3 MB, on a machine that has 9."""
    lefts = iter(
        [memory_left(_root(tmp_path / name, {**MEMINFO, **IN_V2})) for name in ("a", "b" if is_apart else "a")]
    )
    monkeypatch.setattr(memory_left_module, "memory_left", lambda: next(lefts))
    monkeypatch.setattr(memory_left_module, "_WRITER", 0)
    with nullcontext() if fits else pytest.raises(SaveFailedError, match="MB are left there"):
        check_memory(_Two(), arena * MB, steps_on_host=False)


class _Two(SingleProcess):
    def exchange(self, value, answer):
        return answer([value, replace(value, left=memory_left_module.memory_left())])


def test_what_a_step_has_given_back_is_wanted_again():
    block = torch.ones(64 * MB, dtype=torch.uint8)
    del block
    assert given_back() >= 60 * MB


def test_the_process_that_writes_is_counted():
    """Its own memory is no more than that, as it has nothing to do, and at work."""
    saver = AsyncSaver(LocalDisk(), SingleProcess())
    writer = saver.prepare(snapshot_of(1)).writer
    own = psutil.Process(writer.pid).memory_full_info().uss
    saver.close()
    assert 4 * MB < own < memory_left_module._WRITER


def test_a_process_whose_name_is_cut_within_a_letter_is_read_all_the_same(tmp_path):
    status = tmp_path / "proc" / "self" / "status"
    status.parent.mkdir(parents=True)
    status.write_bytes("Name:\té".encode()[:-1] + b"\nVmHWM:\t10 kB\nVmRSS:\t4 kB\n")
    assert given_back(tmp_path) == 6 << 10


def test_what_does_not_fit_is_not_taken():
    """Were it, the kernel would end the process. Whoever prepares goes on with synchronous saves."""
    weight = torch.zeros(1, dtype=torch.int8).expand(4096 * MB)
    large = take({"state_dict": {f"w{i}": weight for i in range(4096)}})
    saver = AsyncSaver(LocalDisk(), SingleProcess())
    with pytest.raises(
        SaveFailedError, match=r"could not be set up: it takes \d+ MB of memory on .*, and \d+ MB are left"
    ):
        saver.prepare(large)
    saver.prepare(snapshot_of(1))
    saver.close()
