"""Ranks that hang are ended, healthy ones are left alone."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
from processes import python
from toy import ToyModel, loader, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint, NeMoLogger
from nemologger.callbacks import fault_tolerance
from nemologger.callbacks.fault_tolerance import FaultTolerance
from nemologger.checkpoint.writing.async_saver import AsyncSaver
from nemologger.disk import LocalDisk
from nemologger.watch.board import Section

SCRIPT = Path(__file__).parents[1] / "helpers" / "watched.py"
AGENT = Path(__file__).parents[1] / "agent.py"


def elastic(directory: Path, steps: int, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Two ranks that are started again once; the log has what all said."""
    settings = json.dumps({"workload_check_interval": 0.1, **options})
    command = [
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
        SCRIPT,
        directory,
        steps,
        "--tolerate",
        settings,
    ]
    # Else restarted ranks may find the addresses of the first ones.
    given = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return python(AGENT, *command, *arguments, check=False, timeout=240, extra=given)


def steps(directory: Path, rank: int) -> list[int]:
    return [int(line) for line in (directory / f"steps-{rank}.txt").read_text().split()]


def monitors(directory: Path) -> list[psutil.Process]:
    """Monitors that still look after a run in ``directory``."""
    commands = ((process, " ".join(process.info["cmdline"] or [])) for process in psutil.process_iter(["cmdline"]))
    return [process for process, command in commands if "guard_main" in command and str(directory) in command]


@pytest.mark.dist
@pytest.mark.parametrize("how", ["sleep", "stop"])
def test_the_rank_that_hangs_is_ended_and_the_run_goes_on(tmp_path, how):
    done = elastic(tmp_path, 14, "--hangs", 1, "--at", 7, "--how", how, rank_heartbeat_timeout=3)
    assert done.returncode == 0, done.stderr[-5000:]
    # from the checkpoint of step 5 on; the rank that waited was not ended by its monitor
    assert steps(tmp_path, 1) == [*range(7), *range(5, 14)]
    assert steps(tmp_path, 0) == [*range(8), *range(5, 14)]
    hangs = [line for line in done.stderr.splitlines() if "hangs: no sign of life" in line]
    assert len(hangs) == 1
    assert "rank 1 on host" in hangs[0]
    assert "training, step 7" in hangs[0]
    earlier = tmp_path / "toy" / "run_0"
    for name in ("nemo_log_globalrank-1_localrank-1.txt", "nemo_error_log.txt"):
        text = (earlier / name).read_text()
        assert "rank 1 on host" in text
        assert ("in training_step" if how == "sleep" else "stopped by a signal") in text
    assert "hangs: no sign" not in (earlier / "nemo_log_globalrank-0_localrank-0.txt").read_text()
    assert monitors(tmp_path) == []


@pytest.mark.dist
def test_the_timeout_is_learned(tmp_path):
    """The given one is an hour."""
    done = elastic(
        tmp_path, 60, "--hangs", 0, "--at", 50, "--every", 10, safety_factor=5.0, workload_check_interval=0.5
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (hangs,) = [line for line in done.stderr.splitlines() if "hangs: no sign of life" in line]
    assert "rank 0 on host" in hangs
    timeout = float(hangs.partition("(timeout ")[2].split()[0])
    assert 6 <= timeout < 100  # at least twelve looks
    assert steps(tmp_path, 0) == [*range(50), *range(50, 60)]


@pytest.mark.dist
def test_slow_validation_and_saving_are_left_alone(tmp_path):
    """A validation batch takes longer than a step may."""
    done = elastic(tmp_path, 12, "--validation", 5, "--every", 4, rank_heartbeat_timeout=4, calculate_timeouts=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert steps(tmp_path, 0) == list(range(12))
    assert "hangs" not in done.stderr
    assert "waiting for other ranks" not in done.stderr


def test_one_process_hangs_without_a_launcher(tmp_path):
    settings = json.dumps({"workload_check_interval": 0.1, "rank_heartbeat_timeout": 3.0})
    arguments = [tmp_path, 14, "--devices", 1, "--hangs", 0, "--at", 7, "--tolerate", settings]
    assert python(SCRIPT, *arguments, check=False).returncode == -signal.SIGKILL
    # the next start, by whoever it may be, goes on; it hangs no more
    python(SCRIPT, *arguments[:4])
    assert steps(tmp_path, 0) == [*range(7), *range(5, 14)]


class Sections(FaultTolerance):
    """Remembers what it told the monitor."""

    def __init__(self, **options):
        super().__init__(**options)
        self.told: list[str] = []
        self.monitor: int | None = None

    def _give_sign(self, trainer, section, **options):
        super()._give_sign(trainer, section, **options)
        sign = self._board.last_sign()
        self.monitor = self._guard.pid
        self.told.append(f"{sign.section.name.lower()} {sign.step}")


def test_what_a_run_tells_its_monitor(tmp_path):
    callback = Sections()
    trainer = quiet_trainer(
        max_epochs=2, limit_train_batches=4, check_val_every_n_epoch=1, val_check_interval=4, callbacks=[callback],
        num_sanity_val_steps=1, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(ToyModel(), loader(), loader())
    per_epoch = [["validation {0}", "validation {0}", "step {0}", "epoch {0}"]] * 2
    (tail_1, tail_2) = ([line.format(step) for line in lines] for step, lines in zip((4, 8), per_epoch, strict=True))
    without_saves = [told for told in callback.told if not told.startswith("checkpoint")]
    assert without_saves == [
        "start 0", "start 0", "start 0",
        "start 1", "start 2", "step 3", "step 4", *tail_1,
        "step 5", "step 6", "step 7", "step 8", *tail_2, "end 8",
    ]  # fmt: skip
    assert not psutil.pid_exists(callback.monitor)


class Asks(LocalDisk):
    """Asks what the monitor was told that the rank does, whenever the thread that trains uses the disk."""

    def __init__(self, callback: FaultTolerance) -> None:
        self.callback = callback
        self.seen: list[Section] = []

    def write(self, path, parts):
        if path.name == "manifest.json" and threading.current_thread() is threading.main_thread():
            self.seen.append(self.callback._board.last_sign().section)
        super().write(path, parts)


@pytest.mark.parametrize("interval", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}])
def test_a_disk_that_is_waited_for_is_no_step_that_hangs(tmp_path, monkeypatch, interval):
    """Waiting for what is saved beside training, and the save that comes last."""
    callback = FaultTolerance()
    disk = Asks(callback)
    waits = []

    def finish(saver):
        waits.append(callback._board.last_sign().section)
        return finish_it(saver)

    finish_it = AsyncSaver.finish
    monkeypatch.setattr(AsyncSaver, "finish", finish)
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, filename="{step}", async_save=True, save_top_k=-1, disk=disk,
        always_save_context=False, save_context_on_train_end=False, **interval,
    )  # fmt: skip
    trainer = quiet_trainer(
        max_epochs=4, limit_train_batches=8, val_check_interval=1.0, check_val_every_n_epoch=1, limit_val_batches=3,
        callbacks=[callback, ckpt],
    )  # fmt: skip
    trainer.fit(ToyModel(), loader(), loader())
    assert disk.seen
    assert waits
    assert {*disk.seen, *waits} <= {Section.CHECKPOINT, Section.END}
    assert callback._section is Section.END


def test_a_monitor_that_died_is_started_again(caplog):
    class Kills(Sections):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 3:
                psutil.Process(self.monitor).kill()
                psutil.Process(self.monitor).wait(10)

    callback = Kills()
    trainer = quiet_trainer(max_steps=10, callbacks=[callback])
    monitors = []
    callback.on_validation_end = lambda *_: monitors.append(callback._guard.pid)
    with caplog.at_level(logging.WARNING, "nemologger"):
        trainer.fit(ToyModel(), loader(), loader())
    assert "another one is started" in caplog.text
    assert monitors[0] == callback.monitor
    assert not psutil.pid_exists(callback.monitor)


def test_an_exception_ends_the_monitor():
    class Fails(ToyModel):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    callback = Sections()
    with pytest.raises(KeyError, match="mine"):
        quiet_trainer(max_steps=10, callbacks=[callback]).fit(Fails(), loader(), loader())
    assert not psutil.pid_exists(callback.monitor)


def test_what_was_learned_is_in_the_checkpoint(tmp_path):
    first = FaultTolerance()
    trainer = quiet_trainer(max_steps=40, callbacks=[first], default_root_dir=tmp_path)
    trainer.fit(ToyModel(), loader(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    class Looks(FaultTolerance):
        def on_train_start(self, trainer, pl_module):
            self.at_start = self._board.timeout(Section.STEP), self._board.timeout(Section.START)

    second = Looks()
    quiet_trainer(max_steps=41, callbacks=[second], default_root_dir=tmp_path).fit(
        ToyModel(), loader(), loader(), ckpt_path=tmp_path / "x.ckpt"
    )
    assert second.at_start == (2700.0, 3600.0)  # another class: not its state
    state = first.state_dict()
    assert state["learned"]["step"]["seen"] > 32
    third = Looks()
    third.load_state_dict(state)
    quiet_trainer(max_steps=2, callbacks=[third], default_root_dir=tmp_path).fit(ToyModel(), loader(), loader())
    assert third.at_start == (60.0, 3600.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rank_heartbeat_timeout": 0}, "rank_heartbeat_timeout=0"),
        ({"initial_rank_heartbeat_timeout": -1.0}, "initial_rank_heartbeat_timeout=-1.0"),
        ({"safety_factor": 0.5}, "safety_factor=0.5"),
        ({"workload_check_interval": 0}, "workload_check_interval=0"),
        ({"rank_termination_signal": "SIGNOTHING"}, "SIGNOTHING"),
        ({"rank_termination_signal": 9999}, "9999"),
        ({"log_level": "LOUD"}, "log_level='LOUD'"),
        (
            {"calculate_timeouts": False, "rank_heartbeat_timeout": None, "initial_rank_heartbeat_timeout": None},
            "no timeout at all",
        ),
    ],
)
def test_arguments_that_cannot_work(arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        FaultTolerance(**arguments)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_rank_restarts", 3),
        ("max_subsequent_job_failures", 3),
        ("additional_ft_launcher_args", "--x"),
        ("simulated_fault", {"fault_type": "rank_hung", "base_delay": 1}),
    ],
)
def test_arguments_without_effect_are_said(argument, value, caplog):
    FaultTolerance(**{argument: value})
    assert f"FaultTolerance({argument}=" in caplog.text
    assert "has no effect" in caplog.text


def test_a_store_that_outlives_restarts_is_warned_of_where_no_logger_has(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fault_tolerance, "why_restarts_may_hang", lambda world_size: "as it was started, it may hang")
    for said in (True, False):
        trainer = quiet_trainer(max_steps=1, callbacks=[FaultTolerance()])
        if not said:
            NeMoLogger(log_dir=tmp_path).setup(trainer)
        caplog.clear()
        trainer.fit(ToyModel(), loader(), loader())
        assert ("it may hang" in caplog.text) is said
