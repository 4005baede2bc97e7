"""Sweeps, run as people run them: a script, ``-m``, and the processes that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from processes import environment, started, wait_for

SCRIPT = Path(__file__).with_name("sweep_toy.py")
RECORDS = Path("nemo_experiments", "sweeps", "sweep_toy", "toy")


def sweep(*overrides: str, timeout: float = 240, **extra: str) -> subprocess.CompletedProcess[str]:
    """``python sweep_toy.py -m OVERRIDES`` in the working directory."""
    command = [sys.executable, str(SCRIPT), "-m", *overrides]
    return subprocess.run(command, env=environment(extra), capture_output=True, text=True, timeout=timeout)


def states() -> dict[str, str]:
    """What became of each combination."""
    records = [json.loads(path.read_text()) for path in RECORDS.glob("*/job.json")]
    return {record["name"]: record["state"] for record in records}


def diary(path: str = "diary.txt") -> list[str]:
    """The name in each line."""
    return [line.split("\t")[0] for line in Path(path).read_text().splitlines()]


def test_a_crash_does_not_stop_the_others_and_a_second_start_runs_what_is_left():
    fixed = [
        "train=false",
        f"diary={Path.cwd()}/diary.txt",
        "hydra.job.config.override_dirname.exclude_keys=[diary,train]",
    ]
    first = sweep("crash=raise,kill,null", "model.lr=0.1", *fixed)
    assert first.returncode == 1
    assert "ValueError: cannot work with width 4" in first.stderr
    assert "SweepError: 2 of 3 combinations failed; 1 of 3 combinations are finished" in first.stderr
    assert "ended by SIGKILL before the job function returned" in first.stderr
    ends = {"null": "finished", "raise": "failed", "kill": "failed"}
    assert states() == {f"crash={crash},model.lr=0.1": end for crash, end in ends.items()}
    assert sorted(diary()) == sorted(states())

    Path("diary.txt").unlink()
    again = sweep("crash=null,raise", "model.lr=0.1", *fixed)
    assert diary() == ["crash=raise,model.lr=0.1"]
    assert again.stdout.count("skipped") == 1
    assert "1 of 2 combinations failed" in again.stderr

    Path("diary.txt").unlink()
    longer = sweep("crash=null", "model.lr=0.1", "trainer.max_steps=9", *fixed)
    assert longer.returncode == 0, longer.stderr
    assert len(diary()) == 1
    assert "runs again (trainer.max_steps: 4 -> 9)" in longer.stdout


def test_side_by_side_on_several_devices():
    """Two are killed beside the others, which go on."""
    done = sweep(
        "crash=null,kill",
        "model.lr=0.1,0.2",
        "train=false",
        "pause=2",
        f"diary={Path.cwd()}/diary.txt",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=4",
        CUDA_VISIBLE_DEVICES="3,5",
    )
    assert done.returncode == 1
    assert "2 of 4 combinations failed; 2 of 4 combinations are finished" in done.stderr, done.stderr
    assert {line.split("\t")[2] for line in Path("diary.txt").read_text().splitlines()} == {"3", "5"}
    assert len(list(RECORDS.glob("*/output.log"))) == 4


def test_submitit_launches_a_sweep():
    """Its local executor does what its Slurm executor does, but for Slurm: a job for each, started from a pickle."""
    arguments = ["crash=null,raise", "train=false", f"diary={Path.cwd()}/diary.txt", "hydra/launcher=submitit_local"]
    keys = "hydra.job.config.override_dirname.exclude_keys=[diary,train]"
    first = sweep(*arguments, keys)
    assert first.returncode == 1
    assert "ValueError: cannot work with width 4" in first.stderr
    assert "SweepError: 1 of 2 combinations failed; 1 of 2 combinations are finished" in first.stderr
    assert states() == {"crash=null": "finished", "crash=raise": "failed"}
    assert sorted(diary()) == ["crash=null", "crash=raise"]
    assert {line.split("\t")[1] for line in Path("diary.txt").read_text().splitlines()} == {os.getcwd()}
    assert len(list(RECORDS.glob(".submitit/*/*_submitted.pkl"))) == 2, "they were not submitit's jobs"

    again = sweep("crash=null", *arguments[1:], keys)
    assert again.returncode == 0, again.stderr
    assert sorted(diary()) == ["crash=null", "crash=raise"], "what is finished ran again"


def test_a_sweep_that_is_killed_goes_on():
    """Of 2 x 2, one crashes; the sweep is killed while the third trains; started again, that resumes and the rest runs."""
    arguments = ("model.width=4,8", "model.lr=0.1,0.01", f"dir={Path.cwd()}/runs")
    quick = "hydra.job.config.override_dirname.exclude_keys=[dir,crash,pause]"
    names = [f"model.lr={lr},model.width={width}" for width in (4, 8) for lr in ("0.1", "0.01")]
    runs = [Path("runs", "toy", name) for name in names]
    with started(SCRIPT, "-m", *arguments, quick, "trainer.max_steps=4", "pause=1.0") as process:
        wait_for(lambda: any(runs[1].glob("checkpoints/*-last/manifest.json")), timeout=150)
        os.kill(process.pid, signal.SIGKILL)  # the sweep alone: what it has started is to notice
        process.wait()
        child = int((runs[1] / "diary.txt").read_text().split()[0])
        wait_for(lambda: _is_gone(child))
    assert states()[names[0]] == "finished"
    assert states()[names[1]] != "finished"
    before = (runs[0] / "diary.txt").read_text()

    done = sweep(*arguments, quick, "trainer.max_steps=4", "pause=0.0", "crash=8")
    assert done.returncode == 1
    assert states() == {names[0]: "finished", names[1]: "finished", names[2]: "failed", names[3]: "failed"}
    assert "2 of 4 combinations failed" in done.stderr
    first = (runs[0] / "diary.txt").read_text()
    assert first == before
    lives = [line.split() for line in (runs[1] / "diary.txt").read_text().splitlines()]
    assert [step for _, step in lives] == ["1", "2", "3", "4"], "a step was repeated, or left out"
    assert len({pid for pid, _ in lives}) == 2


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _left_of(session: int) -> list[int]:
    """The processes that still run of those that the leader of a session has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, leader, *_ = stat.read_text().rsplit(")", 1)[1].split()
            if int(leader) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.dist
def test_a_combination_may_have_several_ranks():
    done = sweep("model.lr=0.1", "trainer.devices=2", "trainer.max_steps=1", f"dir={Path.cwd()}/runs")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(states().values()) == ["finished"]
    (run,) = Path("runs", "toy").iterdir()
    assert len(list(run.glob("checkpoints/*-last/weights/*.distcp"))) == 4, "of two ranks"


def test_a_sweep_that_is_started_as_several_ranks_is_refused():
    done = sweep("model.lr=0.1,0.01", LOCAL_RANK="0")
    assert done.returncode == 1
    assert "started as one of several ranks (LOCAL_RANK is set)" in done.stderr
    assert states() == {}


def test_ctrl_c_stops_a_sweep():
    with started(
        SCRIPT, "-m", "model.lr=0.1,0.01", "train=false", "pause=60", f"diary={Path.cwd()}/diary.txt"
    ) as process:
        wait_for(lambda: Path("diary.txt").exists() and diary())
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=120) != 0
    assert len(diary()) == 1
    assert list(states().values()) == ["failed"]


def test_nothing_new_is_started_when_the_sweep_is_killed_beside_its_workers():
    arguments = ("model.lr=1,2,3,4", "train=false", "pause=300", f"diary={Path.cwd()}/diary.txt")
    with started(SCRIPT, "-m", *arguments, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") as process:
        wait_for(lambda: Path("diary.txt").exists() and len(diary()) == 2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not _left_of(process.pid), timeout=200)  # all of it stopped before its time, workers too
        assert len(diary()) == 2
        assert list(states().values()) == ["failed", "failed"]
