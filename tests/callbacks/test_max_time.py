"""A run of limited time: saved, stopped, not taken for finished, and gone on with."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
from helpers.disks import FailingDisk
from helpers.stopped import STEPS, Run
from lightning.pytorch.callbacks import Callback
from processes import torchrun
from toy import ToyModel, loader, manifests, names, quiet_trainer

import nemologger as nl
from nemologger.callbacks import MaxTimePerRun
from nemologger.errors import ConfigurationError, SaveFailedError

SCRIPT = Path(__file__).parents[1] / "train_stopped.py"
EPOCHS = {"max_epochs": 2, "max_steps": -1, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}


class TimeIsOver(Callback):
    """Lets the time of ``limit`` be over before the n-th batch of this life."""

    def __init__(self, limit: MaxTimePerRun, batch: int) -> None:
        self.limit, self.left = limit, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left -= 1
        if self.left == 0:
            self.limit._end = time.monotonic()


class EndHooks(Callback):
    """Hears that training has ended."""

    ended = False

    def on_train_end(self, trainer, pl_module):
        self.ended = True


@pytest.mark.parametrize("trainer", [{}, EPOCHS, {"accumulate_grad_batches": 2, "max_steps": 10}])
@pytest.mark.parametrize("batch", [3, 5, 10])
def test_the_next_run_goes_on(tmp_path, trainer, batch, caplog):
    run, limit, hooks = Run(tmp_path, trainer=trainer), MaxTimePerRun({"hours": 1}), EndHooks()
    stopped = run.train(limit, hooks, TimeIsOver(limit, batch))
    assert limit.reached
    assert not hooks.ended
    assert stopped.ckpt_path is None
    assert len(run.losses) == batch + batch % trainer.get("accumulate_grad_batches", 1)
    taken = stopped.global_step
    said = [record.getMessage() for record in caplog.records if "saves and stops" in record.getMessage()]
    head = f"the time of this run (1:00:00) is over: this run saves and stops at step {taken}"
    assert said in ([head], [f"{head}, after the validation that is due now", head])
    assert f"step={taken}-last" in names(run.checkpoints)
    again = MaxTimePerRun("00:01:00:00")
    run.goes_on(again)
    assert not again.reached


def test_the_optimizer_is_saved_even_where_a_finished_run_leaves_it_out(tmp_path):
    run, limit = Run(tmp_path, ckpt={"save_optim_on_train_end": False}), MaxTimePerRun({"hours": 1})
    run.train(limit, TimeIsOver(limit, 4))
    assert all(manifest.has_optimizer for manifest in manifests(run.checkpoints).values())
    run.goes_on()
    assert not manifests(run.checkpoints)[f"step={STEPS}-last"].has_optimizer


def test_each_run_has_all_the_time(tmp_path):
    """A clock that went on from the run before would stop at the first step."""

    class TimeIsUp(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                clock._end = time.monotonic()

    run, clock = Run(tmp_path), MaxTimePerRun({"hours": 1})
    for taken in (2, 12):
        run.train(clock, TimeIsUp())
        assert len(run.losses) == taken
    run.goes_on(clock)


def test_a_failed_save_raises(tmp_path):
    ckpt = nl.ModelCheckpoint(dirpath=tmp_path, filename="{step}", disk=FailingDisk(0, only=("write",), forever=True))
    trainer = quiet_trainer(max_steps=9, callbacks=[MaxTimePerRun({"microseconds": 1}), ckpt])
    with pytest.raises(SaveFailedError):
        trainer.fit(ToyModel(), loader(), loader())


def test_the_same_trainer_can_fit_again(tmp_path):
    limit = MaxTimePerRun({"microseconds": 1})
    trainer = quiet_trainer(max_steps=9, callbacks=[limit, nl.ModelCheckpoint(dirpath=tmp_path, filename="{step}")])
    model = ToyModel()
    trainer.fit(model, loader(), loader())
    assert (trainer.global_step, limit.reached) == (1, True)
    limit.duration = timedelta(hours=1)
    trainer.fit(model, loader(), loader())
    assert (trainer.global_step, limit.reached) == (9, False)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("00:03:45:00", timedelta(hours=3, minutes=45)),
        (" 10:00:00:01 ", timedelta(days=10, seconds=1)),
        (timedelta(minutes=5), timedelta(minutes=5)),
        ({"hours": 1.5}, timedelta(minutes=90)),
    ],
)
def test_durations(duration, expected):
    assert MaxTimePerRun(duration).duration == expected


@pytest.mark.parametrize(
    "duration", ["3:45:00", "1h", "", 3600, {"fortnights": 1}, {"hours": "1"}, "00:00:00:00", None]
)
def test_what_is_no_duration(duration):
    with pytest.raises(ConfigurationError, match="MaxTimePerRun"):
        MaxTimePerRun(duration)


@pytest.mark.parametrize("duration", [2160000, "2160000"])  # what a section makes of 10:00:00:00
def test_one_that_yaml_has_read_as_a_number_says_that_it_needs_quotes(duration):
    with pytest.raises(ConfigurationError, match=r"In YAML, quote it"):
        MaxTimePerRun(duration)
    with pytest.raises(ConfigurationError, match=r'\{"hours": 3\}\)$'):
        MaxTimePerRun("1h")


@pytest.mark.dist
def test_two_ranks_stop_after_the_same_step(tmp_path):
    options = ("--devices", 2, "--pause", 0.05)
    torchrun(SCRIPT, 2, tmp_path, 400, "--max-time", 6, *options)
    taken = [len((tmp_path / f"losses-{rank}.txt").read_text().splitlines()) for rank in (0, 1)]
    assert 0 < taken[0] == taken[1] < 400
    checkpoints = tmp_path / "toy" / "checkpoints"
    assert f"step={taken[0]}-last" in names(checkpoints)
    for rank in (0, 1):
        assert "reached=True" in (tmp_path / f"after-{rank}").read_text()
    torchrun(SCRIPT, 2, tmp_path, taken[0] + 3, "--max-time", 3600, "--devices", 2)
    assert len((tmp_path / "losses-1.txt").read_text().splitlines()) == taken[0] + 3
    assert f"step={taken[0] + 3}-last" in names(checkpoints)
