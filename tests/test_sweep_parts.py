"""The parts of a sweep by themselves."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys

import lightning.pytorch as pl
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from toy import ToyDataModule, ToyModel, quiet_trainer

import nemologger as nl
from nemologger.combination import VARIABLE
from nemologger.run.record import close_log
from nemologger.sweeps import child, devices, record
from nemologger.sweeps.naming import job_name
from nemologger.sweeps.program import quoted
from nemologger.sweeps.record import Record, State


@pytest.mark.parametrize(
    ("overrides", "options", "name"),
    [
        (["b=2", "a=1"], {}, "a=1,b=2"),
        (["+a=1"], {}, "a=1"),
        ([], {}, "defaults"),
        (["trainer.max_steps=1", "a=1"], {"excluded": ["trainer."]}, "a=1"),
        (
            ["trainer.max_steps=1", "a=1"],
            {"excluded": ["trainer."], "swept": ["trainer.max_steps"]},
            "a=1,trainer.max_steps=1",
        ),
        (["a=[1,2]"], {}, "a=_1,2_-"),
        (["../x=1"], {}, "x=1-"),
    ],
)
def test_names(overrides, options, name):
    found = job_name(overrides, **options)
    assert found == name or (name.endswith("-") and found.startswith(name) and len(found) == len(name) + 8)


@given(st.text(min_size=1), st.text(min_size=1))
def test_names_are_directories_and_differ(one, other):
    names = [job_name([f"key={text}"]) for text in (one, other)]
    assert (names[0] == names[1]) == (one == other)
    for name in names:
        assert 0 < len(os.fsencode(name)) < 150
        assert "/" not in name
        assert not name.startswith((".", "-"))


@given(st.text(alphabet=st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"])))
def test_quoted_text_reaches_hydra_as_it_is(text):
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


def test_a_record_survives_what_json_does_not_know(tmp_path):
    planned = Record("a=1", ("a=1",), {"a": math.nan, "path": "p"}, State.RUNNING, "launch")
    record.write(tmp_path / "a=1", planned.now(State.FINISHED, value=tmp_path))
    back = record.read(tmp_path / "a=1")
    assert back.state is State.FINISHED
    assert back.value == str(tmp_path)
    assert record.changes(back.config, planned.config) == []
    assert [r.name for r in record.of_launch(tmp_path, "launch")] == ["a=1"]
    assert record.of_launch(tmp_path, "another") == []
    (tmp_path / "a=1" / record.FILE).write_text('{"name": ')
    assert record.read(tmp_path / "a=1") is None


def test_the_least_used_devices_are_taken(tmp_path):
    # Several locks of one process do not exclude each other: other processes are stood in for by forks that wait.
    choices = [("0", "1"), ("2", "3")]
    children = []
    seen = []
    for _ in range(4):
        ready, say = os.pipe()
        wait, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            slot = devices.take(tmp_path, choices, 2)
            os.write(say, "".join(slot.devices).encode())
            os.read(wait, 1)
            os._exit(0)
        seen.append(os.read(ready, 9).decode())
        children.append((pid, go, ready, say, wait))
    assert seen == ["01", "23", "01", "23"]
    for pid, *pipes in children:
        os.write(pipes[0], b"x")
        os.waitpid(pid, 0)
        for pipe in pipes:
            os.close(pipe)


@pytest.fixture
def job(tmp_path, monkeypatch):
    found = nl.SweepJob("lr=0.1", 0, ("lr=0.1",), tmp_path / "record")
    found.directory.mkdir()
    monkeypatch.setenv(VARIABLE, found.dumps())
    assert nl.sweep_job() == found
    return found


class Leave(pl.Callback):
    """Ends ``fit`` between two steps, without an error and before training has ended."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        from lightning.pytorch.trainer.call import _TunerExitException

        if trainer.global_step == 2:
            raise _TunerExitException


@pytest.mark.parametrize("stops", [True, False])
def test_a_fit_that_stops_for_now_is_not_finished(job, tmp_path, stops):
    trainer = quiet_trainer(max_steps=5, callbacks=[Leave()] if stops else [])
    nl.train(ToyModel(), ToyDataModule(), trainer, nl.NeMoLogger(name="toy", log_dir=tmp_path, version="v"))
    assert job.postponed() == ("training was stopped at step 2, before its end" if stops else None)
    job.begin()
    assert job.postponed() is None


def test_a_run_directory_belongs_to_one_combination(job, tmp_path):
    def set_up():
        trainer = quiet_trainer()
        try:
            nl.NeMoLogger(name="toy", log_dir=tmp_path, version="v").setup(trainer)
        finally:
            close_log(trainer)

    set_up()
    owner = tmp_path / "toy" / "v" / "sweep_job.json"
    assert json.loads(owner.read_text())["name"] == "lr=0.1"
    set_up()
    owner.write_text(json.dumps({"name": "lr=0.2"}))
    with pytest.raises(nl.ConfigurationError, match=r"is the run directory of the combination lr=0\.2"):
        set_up()


def test_an_environment_that_was_tampered_with_is_named(monkeypatch):
    monkeypatch.setenv(VARIABLE, shlex.quote("lr=0.1"))
    with pytest.raises(nl.ConfigurationError, match=f"{VARIABLE} is"):
        nl.sweep_job()


_TOLD = """
import os, signal
from nemologger.sweeps import child
child.hold_lifeline(os.environ)
os.kill(os.getpid(), signal.SIGUSR2)
print("goes on", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_what_trains_leaves_the_signal_for_submitit_to_the_process_that_waits(tmp_path):
    """Slurm sends it to both: the one has the job requeued, and SIGTERM then tells the other to save."""
    output = tmp_path / "output"
    command = [sys.executable, "-c", _TOLD]
    assert child.run(command, os.environ, directory=str(tmp_path), output=output, parent=None) == -signal.SIGTERM
    assert output.read_text() == "goes on\n"
