"""Every byte of every file is checked, and what is wrong is named."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.engine import newest_in, save, step_in

from nemologger.checkpoint import manifest, verify
from nemologger.checkpoint.find import Status, inspect
from nemologger.checkpoint.manifest import BLOCK
from nemologger.checkpoint.verify import Problem, problems
from nemologger.disk import LocalDisk
from nemologger.errors import RankError
from nemologger.loading.verified_reads import VerifiedReads
from nemologger.ranks import SingleProcess

FILES = [
    "manifest.json",
    "context/io.json",
    "weights/.metadata",
    "weights/common.pt",
    "weights/metadata.json",
    "weights/__0_0.distcp",
    "weights/__0_1.distcp",
]


def flip_first(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARMS = [flip_first, flip_middle, flip_last, truncate, extend, empty, remove, replace_by_directory]


@pytest.fixture
def two(tmp_path):
    """A directory with two checkpoints; the newest is the one to damage."""
    save(tmp_path / "step=1", 1)
    save(tmp_path / "step=2", 2)
    return tmp_path


def test_these_are_all_the_files(two):
    below = (two / "step=2").rglob("*")
    assert sorted(p.relative_to(two / "step=2").as_posix() for p in below if p.is_file()) == sorted(FILES)


def test_a_whole_one_has_no_problems(two):
    assert problems(two / "step=2") == []
    assert problems(two / "step=2", deep=False) == []


@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_named_and_fallen_back_from(two, file):
    """A byte flipped, each file truncated, emptied, removed, in turn; the rest of the files are not suspected."""
    newest = two / "step=2"
    content = (newest / file).read_bytes()
    for harm in HARMS:
        harm(newest / file)
        found = problems(newest)
        assert [problem.file for problem in found] == [file], harm.__name__
        assert file in str(found[0])
        fallback = newest_in(two)
        assert fallback.path == two / "step=1", harm.__name__
        assert step_in(fallback.path) == 1
        LocalDisk().remove(newest / file)
        (newest / file).write_bytes(content)
    assert newest_in(two).path == newest


@pytest.mark.parametrize("harm", [truncate, empty, remove])
def test_sizes_are_checked_without_reading(two, harm):
    harm(two / "step=2" / "weights" / "__0_0.distcp")
    assert [problem.file for problem in problems(two / "step=2", deep=False)] == ["weights/__0_0.distcp"]


def test_the_message_says_what_was_expected_and_found(two):
    path = two / "step=2" / "weights" / "common.pt"
    size = path.stat().st_size
    truncate(path)
    assert str(problems(two / "step=2")[0]) == f"weights/common.pt: has {size - 1} bytes, {size} were written"
    remove(path)
    assert str(problems(two / "step=2")[0]) == "weights/common.pt: is missing"


def test_several_problems_are_all_named(two):
    for file in FILES[1:]:
        flip_middle(two / "step=2" / file)
    assert {problem.file for problem in problems(two / "step=2")} == set(FILES[1:])


def test_the_message_says_where_in_a_large_file(tmp_path):
    import numpy as np
    import torch

    from nemologger.checkpoint.manifest import Manifest
    from nemologger.checkpoint.state.snapshot import take
    from nemologger.checkpoint.writing.saver import Saver
    from nemologger.ranks import SingleProcess

    state = {"state_dict": {"large": torch.zeros(BLOCK // 4 + 5000)}}
    Saver(LocalDisk(), SingleProcess()).save(take(state), tmp_path / "a", Manifest(step=1, epoch=0))
    path = tmp_path / "a" / "weights" / "__0_0.distcp"
    memory = np.memmap(path, dtype=np.uint8, mode="r+")
    memory[BLOCK + 100] ^= 1
    memory.flush()
    (problem,) = problems(tmp_path / "a")
    assert f"bytes {BLOCK} to {path.stat().st_size - 1} have changed" in problem.what


def test_a_checkpoint_whose_manifest_is_damaged_is_not_complete(two):
    flip_middle(two / "step=2" / "manifest.json")
    assert inspect(two / "step=2").status is Status.DAMAGED


@pytest.fixture
def many_blocks(tmp_path, monkeypatch):
    """A checkpoint with a file of eleven small blocks."""
    for module in (manifest, verify):
        monkeypatch.setattr(module, "BLOCK", 512)
    save(tmp_path / "x", 1)
    file = tmp_path / "x" / "weights" / "__0_0.distcp"
    record = manifest.Recorder()
    file.write_bytes(b"".join(record.over([bytes(range(256)) * 21])))
    whole = manifest.read(tmp_path / "x")
    changed = replace(whole, files={**whole.files, "weights/__0_0.distcp": record.record})
    (tmp_path / "x" / "manifest.json").write_bytes(changed.dumps())
    return tmp_path / "x", file


def shares_of(checkpoint: Path, world_size: int) -> list[list[Problem]]:
    found = []
    for rank in range(world_size):
        looking = verify.verifying(checkpoint, rank=rank, world_size=world_size)
        while True:
            try:
                next(looking)
            except StopIteration as end:
                found.append(end.value)
                break
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_whatever_number_of_ranks_shares_the_work_each_damaged_block_is_found_by_one_of_them(many_blocks, world_size):
    checkpoint, file = many_blocks
    assert shares_of(checkpoint, world_size) == [[]] * world_size
    content = file.read_bytes()
    for block in range(11):
        file.write_bytes(content[: block * 512] + b"\xff" + content[block * 512 + 1 :])
        shares = shares_of(checkpoint, world_size)
        assert [problem for share in shares for problem in share] == verify.merged(shares) == problems(checkpoint)
        assert [problem.block for problem in verify.merged(shares)] == [block]


def test_of_several_ranks_findings_the_first_of_each_file_counts(many_blocks):
    checkpoint, file = many_blocks
    file.write_bytes(bytes(11 * 512))
    (checkpoint / "weights" / "common.pt").unlink()
    shares = shares_of(checkpoint, 8)
    assert sum(map(len, shares)) > 2
    assert verify.merged(shares) == problems(checkpoint)
    assert [str(problem).split(":")[0] for problem in problems(checkpoint)] == [
        "weights/__0_0.distcp",
        "weights/common.pt",
    ]


def test_a_share_that_takes_long_says_how_much_there_is_to_do(many_blocks, monkeypatch):
    checkpoint, _ = many_blocks
    monkeypatch.setattr(verify, "_PACE", 0.001)
    monkeypatch.setattr(verify, "_THREADS", 1)
    look, permits = verify._look, threading.Semaphore(1)
    monkeypatch.setattr(verify, "_look", lambda *arguments: permits.acquire() and look(*arguments))
    remaining = []
    for left in verify.verifying(checkpoint):
        remaining.append(left)
        permits.release()  # for one look more
    assert len(remaining) >= 5
    assert remaining == sorted(remaining, reverse=True)
    assert remaining[-1] > 0


def test_what_only_another_rank_sees_is_not_the_checkpoints_fault(tmp_path):
    save(tmp_path / "x", 1)
    claims = [Problem("weights/common.pt", "has changed", 0), Problem("weights/__0_0.distcp", "is missing")]
    read = VerifiedReads(SingleProcess(0, 2), None)
    with pytest.raises(RankError, match=r"rank 1 on far does not read .*common.pt: has changed. Rank 0 on here does"):
        read.faults_only(tmp_path / "x", lambda checkpoint: [("here", []), ("far", claims)])
    assert read.faults_only(tmp_path / "x", lambda checkpoint: [("here", []), ("far", [])]) == []
    (tmp_path / "x" / "weights" / "__0_0.distcp").unlink()
    wrong = read.faults_only(tmp_path / "x", lambda checkpoint: [("here", []), ("far", claims)])
    assert wrong == [str(problem) for problem in claims]
