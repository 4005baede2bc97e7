"""One rank dies, hangs, or has a full disk while all save: the others know which, and lose nothing (contract C9)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import faults, newest_in
from helpers.failing_rank import STEPS, TIMEOUT
from processes import environment, free_port

SCRIPT = Path(__file__).with_name("helpers") / "failing_rank.py"

pytestmark = pytest.mark.dist


def run(directory: Path, how: str) -> tuple[list[int], list[dict]]:
    """Exit codes and ends of both ranks."""
    directory.mkdir()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(directory), how], env=environment({**shared, "LOCAL_RANK": str(rank)})
        )
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    ends = [directory / f"end-{rank}.json" for rank in range(2)]
    return codes, [json.loads(end.read_text()) if end.exists() else {} for end in ends]


def test_a_rank_that_is_killed_is_named_at_once(tmp_path):
    codes, (zero, _) = run(tmp_path / "run", "killed")
    assert codes == [1, -signal.SIGKILL]
    assert zero["error"] == "SilentRankError"
    assert zero["message"].startswith("rank 1 of 2 did not answer")
    assert zero["step"] == 4
    assert newest_in(tmp_path / "run" / "checkpoints").manifest.step == 2


def test_a_rank_that_is_late_ends_both(tmp_path):
    codes, (zero, one) = run(tmp_path / "run", "late")
    assert codes == [1, 1]
    assert zero["error"] == one["error"] == "SilentRankError"
    assert zero["message"].startswith(f"rank 1 of 2 did not answer (seen by rank 0, timeout {TIMEOUT:g} s)")
    newest = newest_in(tmp_path / "run" / "checkpoints")
    assert (newest.manifest.step, faults(newest.path)) == (2, [])


def test_a_full_disk_of_one_rank_costs_one_save(tmp_path):
    codes, ends = run(tmp_path / "run", "full")
    assert codes == [0, 0]
    assert [end["step"] for end in ends] == [STEPS, STEPS]
    logged = (tmp_path / "run" / "log-0.txt").read_text()
    assert "save 1 of at most 3 in a row that may fail" in logged
    assert "rank 1: OSError: [Errno 28] No space left on device" in logged
    newest = newest_in(tmp_path / "run" / "checkpoints")
    assert (newest.manifest.step, faults(newest.path)) == (STEPS, [])


def test_an_exception_of_one_rank_is_not_saved_and_is_what_is_raised(tmp_path):
    codes, (_, one) = run(tmp_path / "run", "raises")
    assert codes == [1, 1]
    assert (one["error"], one["message"]) == ("ZeroDivisionError", "only here")
    assert one["seconds"] < 30
    logged = (tmp_path / "run" / "log-1.txt").read_text()
    assert "the state at the exception is not saved: 1 of 2 ranks did not stop" in logged
    newest = newest_in(tmp_path / "run" / "checkpoints")
    assert (newest.manifest.step, faults(newest.path)) == (2, [])
