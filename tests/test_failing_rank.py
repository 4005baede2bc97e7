"""One rank dies, hangs, is told to stop, or has a full disk: the others know, all end, and nothing is lost (contract C9)."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from helpers.engine import faults, newest_in
from helpers.failing_rank import STEPS, TIMEOUT
from helpers.kill_loop import writers
from processes import ranks, wait_for

SCRIPT = Path(__file__).with_name("helpers") / "failing_rank.py"
TRAIN = Path(__file__).with_name("train_toy.py")

pytestmark = pytest.mark.dist


def run(directory: Path, how: str) -> tuple[list[int], list[dict]]:
    """Exit codes and ends of both ranks."""
    directory.mkdir()
    with ranks(SCRIPT, 2, directory, how) as both:
        codes = [rank.wait(timeout=120) for rank in both]
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


def test_a_save_that_one_rank_has_lost_is_not_waited_for_by_those_that_are_skipped(tmp_path):
    """With ``on_busy="skip"``: else none would be made any more."""
    codes, _ = run(tmp_path / "run", "loses its writer")
    assert codes == [0, 0]
    logged = (tmp_path / "run" / "log-0.txt").read_text()
    assert "step=2 was not saved: rank 1: the writer process" in logged
    assert "is not saved: the save before" not in logged
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step=4", "step=6"}


def test_a_writer_that_hangs_on_one_rank_costs_one_save_and_one_that_dies_or_starts_late_none(tmp_path):
    """The others do not take that rank for dead, though it waits as long as they would wait for it."""
    codes, _ = run(tmp_path / "run", "writer hangs")
    assert codes == [0, 0]
    zero, one = ((tmp_path / "run" / f"log-{rank}.txt").read_text() for rank in range(2))
    assert f"step=4 was not saved: rank 1: nothing was written for {TIMEOUT:g} s" in zero
    assert "another one is started" not in zero
    assert "another one is started" in one
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step=2", "step=6"}


def taken(directory: Path) -> int:
    """How many steps both ranks have taken. Writers are there after the first."""
    logs = [directory / f"losses-{rank}.txt" for rank in range(2)]
    return min(len(log.read_text().splitlines()) if log.exists() else 0 for log in logs)


def test_a_rank_that_is_killed_while_it_saves_beside_training_is_not_waited_for(tmp_path):
    checkpoints = tmp_path / "toy" / "checkpoints"
    command = (TRAIN, 2, tmp_path, 200, "--every", 20, "--devices", 2, "--beside", "--pause", 0.1, "--width", 64)
    with ranks(*command) as (zero, one):
        wait_for(lambda: taken(tmp_path) >= 3)
        (writer,) = writers(one.pid)
        os.kill(writer, signal.SIGSTOP)  # it will not get done
        wait_for(lambda: taken(tmp_path) >= 21)
        assert (checkpoints / "step=20-unfinished").exists()
        one.kill()
        killed = time.monotonic()
        assert zero.wait(timeout=60) == 1
        assert time.monotonic() - killed < 45
    log = (tmp_path / "toy" / "nemo_log_globalrank-0_localrank-0.txt").read_text()
    assert "step=20, which was being written, is lost: nothing more comes from rank 1" in log
    assert not (checkpoints / "step=20" / "manifest.json").exists()


def test_what_all_writers_have_written_is_published_by_who_is_left(tmp_path):
    checkpoints = tmp_path / "toy" / "checkpoints"
    command = (TRAIN, 2, tmp_path, 200, "--every", 20, "--devices", 2, "--beside", "--pause", 0.1, "--width", 64)
    with ranks(*command) as (zero, one):
        wait_for(lambda: taken(tmp_path) >= 3)
        (writer,) = writers(zero.pid)
        os.kill(writer, signal.SIGSTOP)
        wait_for(lambda: taken(tmp_path) >= 21)
        wait_for((checkpoints / "step=20" / "weights" / ".written-by-rank-1").exists)
        one.kill()
        time.sleep(0.5)
        os.kill(writer, signal.SIGCONT)
        assert zero.wait(timeout=60) == 1
    newest = newest_in(checkpoints)
    assert (newest.manifest.step, faults(newest.path)) == (20, [])


def test_an_exception_of_one_rank_is_not_saved_and_is_what_is_raised(tmp_path):
    codes, (_, one) = run(tmp_path / "run", "raises")
    assert codes == [1, 1]
    assert (one["error"], one["message"]) == ("ZeroDivisionError", "only here")
    assert one["seconds"] < 30
    logged = (tmp_path / "run" / "log-1.txt").read_text()
    assert "the state at the exception is not saved: 1 of 2 ranks did not stop" in logged
    newest = newest_in(tmp_path / "run" / "checkpoints")
    assert (newest.manifest.step, faults(newest.path)) == (2, [])


@pytest.mark.parametrize("how", ["hook beside", "callback's hook", "callback's hook, FSDP and EMA"])
def test_a_hook_that_raises_on_one_rank_while_the_state_is_taken_ends_both_at_once(tmp_path, how):
    """Before the ranks' places in their data would be put together, and after that."""
    codes, (zero, one) = run(tmp_path / "run", how)
    assert codes == [1, 1]
    assert (one["error"], one["message"]) == ("ZeroDivisionError", "no state")
    assert (zero["error"], zero["message"]) == ("RankError", "rank 1: ZeroDivisionError: no state")
    assert zero["step"] == one["step"] == 4
    newest = newest_in(tmp_path / "run" / "checkpoints")
    assert (newest.manifest.step, faults(newest.path)) == (2, [])


def test_ranks_with_other_settings_do_not_start(tmp_path):
    """One would save while the other trains, and both would wait."""
    codes, ends = run(tmp_path / "run", "settings")
    assert codes == [1, 1]
    for end in ends:
        assert (end["error"], end["step"]) == ("ConfigurationError", 0)
        assert "ModelCheckpoint(every_n_train_steps=...) is 2 on rank 0 and 3 on rank 1" in end["message"]


@pytest.mark.parametrize("how", ["stops", "both stop"])
def test_sigterm_in_the_middle_of_a_step_ends_all_ranks(tmp_path, how):
    """Lightning's own handler would wait for the other rank, which waits for the gradients of this one."""
    codes, (zero, one) = run(tmp_path / "run", how)
    assert codes == [128 + signal.SIGTERM] * 2
    assert 3 <= zero["step"] == one["step"] < 20
    newest = newest_in(tmp_path / "run" / "checkpoints")
    saved = (
        zero["step"] if how == "stops" else zero["step"] // 2 * 2
    )  # both are told not to save, but for every 2 steps
    assert (newest.manifest.step, faults(newest.path)) == (saved, [])


def test_a_rank_that_is_killed_in_the_middle_of_a_step_ends_the_other_with_an_error(tmp_path):
    command = (SCRIPT, 2, tmp_path, "dies")
    with ranks(*command) as (zero, one):
        assert one.wait(timeout=60) == -signal.SIGKILL
        died = time.monotonic()
        children = psutil.Process(zero.pid).children(recursive=True)
        assert zero.wait(timeout=60) == 1
        assert time.monotonic() - died < 30
    assert psutil.wait_procs(children, timeout=20)[1] == []
    for checkpoint in (tmp_path / "checkpoints").glob("step=*/manifest.json"):
        assert faults(checkpoint.parent) == []
