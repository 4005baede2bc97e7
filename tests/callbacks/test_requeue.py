"""Slurm's signal that the time is nearly over: saved, requeued, and gone on with; no run loads what others have left."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from forked import Forked
from helpers.stopped import Watch
from processes import end, ended, environment, free_port, python
from toy import ToyDataModule, ToyModel, loader, names, quiet_trainer

import nemologger as nl
from nemologger.callbacks import requeue
from nemologger.callbacks.requeue import Fate
from nemologger.checkpoint.verify import problems

SCRIPT = Path(__file__).parents[1] / "train_requeued.py"
FOREIGN = "hpc_ckpt_1.ckpt"

#: It says what it was called with, and ends as it is told; Slurm then sends SIGTERM to all processes of the job.
SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo "$SHOWN" && exit
echo "$@" >> "$CALLED"
[ "$CODE" = 0 ] && kill -TERM $PPID
echo "slurm says something"
exit $CODE
"""


class Job:
    """A job of Slurm, in the current directory, where another run has left a file; it may have several lives."""

    def __init__(self, directory: Path, how: str, *, tasks: int = 1, code: int = 0, **extra: str) -> None:
        self.directory, self.how, self.tasks = directory, how, tasks
        self.called = directory / "called"
        (directory / "bin").mkdir()
        (directory / "bin" / "scontrol").write_text(SCONTROL)
        (directory / "bin" / "scontrol").chmod(0o755)
        Path(FOREIGN).write_bytes(b"whoever loads this fails")
        self.given = {
            "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": str(tasks), "SLURM_NNODES": "1",
            "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "CODE": str(code),
            "CALLED": str(self.called), "PATH": f"{directory / 'bin'}:/usr/bin:/bin", **extra,
        }  # fmt: skip

    def run(self, signal_at: int | None = None, signal_to: int = 0) -> tuple[int, str]:
        """One life; the exit code, and what was printed."""
        given = {**self.given, "MASTER_PORT": str(free_port())}
        if signal_at is not None:
            given |= {"SIGNAL_AT": str(signal_at), "SIGNAL_TO": str(signal_to)}
        output = self.directory / "output"
        with output.open("w") as file:
            ranks = [
                Forked(
                    [str(SCRIPT), self.how, str(self.directory)],
                    environment({**given, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
                    out=file,
                    error=subprocess.STDOUT,
                )
                for rank in range(self.tasks)
            ]
            try:
                code = ended(ranks, 240)
                codes = {rank.wait(60) for rank in ranks}
            finally:
                end(ranks)
        assert codes == {code}, output.read_text()
        return code, output.read_text()

    def losses(self, rank: int = 0) -> list[str]:
        return (self.directory / f"losses-{rank}.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> list[str]:
    """The losses of a run that nobody stops."""
    directory = tmp_path_factory.mktemp("straight")
    python(SCRIPT, "plain", directory)
    return (directory / "losses-0.txt").read_text().splitlines()


def saved_and_requeued(job: Job) -> None:
    """Its first life, with the signal in front of the seventh step."""
    code, output = job.run(signal_at=6)
    assert (code, len(job.losses())) == (138, 7), output
    (checkpoints,) = job.directory.rglob("checkpoints")
    assert problems(checkpoints / "step=7-last") == []
    assert output.count(f"{FOREIGN} is not loaded") == (job.how != "exp_manager")  # which works elsewhere


@pytest.mark.parametrize("how", ["plain", "exp_manager"])
def test_saved_at_the_boundary_requeued_and_gone_on_with(tmp_path, straight, how):
    # The other signal may be there too when a step or a validation has taken long.
    job = Job(tmp_path, how, SIGNALS="SIGTERM SIGUSR1" if how == "exp_manager" else "SIGUSR1")
    saved_and_requeued(job)
    assert job.called.read_text() == "requeue 7\n"
    code, output = job.run()
    assert code == 0, output
    assert job.losses() == straight
    assert names(Path()) == [FOREIGN]
    assert not [*tmp_path.rglob(".requeued-*")]


def test_only_the_same_job_goes_on_from_there(tmp_path, straight):
    """Of a run in a directory that is new at every start."""
    job = Job(tmp_path, "dated", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    saved_and_requeued(job)
    assert job.called.read_text() == "requeue 5_3\n"
    taken = job.losses()
    job.given["SLURM_ARRAY_TASK_ID"] = "4"
    assert job.run()[0] == 0
    job.given["SLURM_ARRAY_TASK_ID"] = "3"
    assert job.run()[0] == 0
    assert job.losses() == [*taken, *straight, *straight[7:]]


def test_training_goes_on_if_the_job_is_not_requeued(tmp_path, straight):
    job = Job(tmp_path, "plain", code=1)
    code, output = job.run(signal_at=6)
    assert code == 0, output
    assert "training goes on while it may: scontrol requeue 7 ended with 1: slurm says something" in output
    assert job.losses() == straight
    assert job.called.read_text() == "requeue 7\n"


#: What Slurm says of a job while SIGTERM stops it. In a partition with a GraceTime it is requeued at the end of that, if it
#: is still there; one that has ended with an exit code has failed, and stays as it is.
PREEMPTED = """JobId=7 JobName=train
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   PreemptEligibleTime=2026-11-30T11:34:57 PreemptTime=2026-11-30T11:35:01"""
KILLED = PREEMPTED.replace("PreemptTime=2026-11-30T11:35:01", "PreemptTime=None")
CANCELLED = PREEMPTED.replace("RUNNING", "COMPLETING")
#: Without a GraceTime, or by ``scontrol requeue``.
REQUEUED = CANCELLED.replace("Restarts=0", "Restarts=1")


@pytest.mark.parametrize(
    ("shown", "called"), [(PREEMPTED, ["requeue 7"]), (REQUEUED, [])], ids=["preempted", "requeued"]
)
def test_a_job_that_slurm_starts_again_after_sigterm_goes_on(tmp_path, straight, shown, called):
    job = Job(tmp_path, "dated", SIGNALS="SIGTERM", SHOWN=shown)
    code, output = job.run(signal_at=6)
    assert (code, len(job.losses())) == (143, 7), output
    assert (job.called.read_text().splitlines() if job.called.exists() else []) == called
    assert job.run()[0] == 0
    assert job.losses() == straight


@pytest.fixture
def here(tmp_path, monkeypatch) -> Job:
    """A job of one process, which is this one."""
    job = Job(tmp_path, "", SLURM_PROCID="0", SLURM_LOCALID="0")
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh")
    for name, value in job.given.items():
        monkeypatch.setenv(name, value)
    return job


@pytest.mark.parametrize(
    ("shown", "restarts", "fate"),
    [
        (PREEMPTED, None, Fate.PREEMPTED),
        (REQUEUED, None, Fate.REQUEUED),
        (REQUEUED, "1", Fate.OTHER),  # cancelled, in its second life
        (KILLED, None, Fate.OTHER),
        (CANCELLED, None, Fate.OTHER),
        ("slurm_load_jobs error: Invalid job id specified", None, Fate.OTHER),
    ],
)
def test_why_sigterm_came(tmp_path, monkeypatch, here, shown, restarts, fate):
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL)
    monkeypatch.setenv("SHOWN", shown)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert requeue._fate() is fate


def as_in_another_process(monkeypatch) -> None:
    monkeypatch.setattr(requeue, "_FITS", count())
    monkeypatch.setattr(requeue, "_ENDED", set())


@pytest.mark.parametrize("together", [False, True])
def test_each_run_of_a_program_goes_on_from_its_own(tmp_path, monkeypatch, here, together):
    """Of several in one process, in directories that are new at every start, or all in the same one."""

    def life(stopped_in: int | None) -> list[list[int]]:
        as_in_another_process(monkeypatch)
        steps = []
        for number in range(2):
            model, watch = ToyModel(), [Watch("batch", 2, signal.SIGUSR1)] if number == stopped_in else []
            trainer = quiet_trainer(max_steps=5, limit_val_batches=0, callbacks=watch)
            given = {"dirpath": tmp_path / "same", "filename": f"{number}", "save_top_k": -1} if together else {}
            log = nl.NeMoLogger(
                log_dir=tmp_path, ckpt=nl.ModelCheckpoint(monitor=None, **given), use_datetime_version=False,
                number_versions=True,
            )  # fmt: skip
            with suppress(SystemExit):
                nl.train(model, ToyDataModule(), trainer, log)
            steps.append([*model.losses])
        return steps

    assert life(stopped_in=1) == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert life(stopped_in=None) == [[0, 1, 2, 3, 4], [3, 4]]


def test_damage_is_found_before_it_is_gone_on_with(tmp_path, monkeypatch, here):
    def life(*watch: Watch) -> list[int]:
        as_in_another_process(monkeypatch)
        ckpt = nl.ModelCheckpoint(
            dirpath=tmp_path / "checkpoints", filename="{step}", monitor=None, every_n_train_steps=1, save_last="link"
        )
        model, trainer = ToyModel(), quiet_trainer(max_steps=5, limit_val_batches=0, callbacks=[ckpt, *watch])
        with suppress(SystemExit):
            trainer.fit(model, ToyDataModule())
        return [*model.losses]

    assert life(Watch("batch", 2, signal.SIGUSR1)) == [0, 1, 2]
    file = next((tmp_path / "checkpoints" / "step=3" / "weights").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert life() == [2, 3, 4]


class _Tested(ToyModel):
    is_stopped = True

    def test_step(self, batch, batch_idx):
        if self.is_stopped:
            signal.raise_signal(signal.SIGUSR1)


def test_what_is_trained_is_not_trained_again_for_a_test_that_was_cut_short(tmp_path, monkeypatch, here):
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL.replace("[", "#"))
    for is_stopped in (True, False):
        as_in_another_process(monkeypatch)
        model = _Tested()
        model.is_stopped = is_stopped
        ckpt = nl.ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor=None)
        trainer = quiet_trainer(max_steps=3, limit_val_batches=0, limit_test_batches=1, callbacks=[ckpt])
        trainer.fit(model, ToyDataModule())
        trainer.test(model, loader())
        requeue._forget_ended()  # as at the end of the program
        assert [*model.losses] == ([0, 1, 2] if is_stopped else [])
        assert len([*tmp_path.rglob(".requeued-*")]) == is_stopped
    assert here.called.read_text() == "requeue 7\n"
    assert names(Path()) == [FOREIGN]
