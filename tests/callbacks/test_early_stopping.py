"""Lightning's EarlyStopping in a run that is stopped and resumed: it counts on."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.stopped import Watch
from lightning.pytorch.callbacks import EarlyStopping
from toy import Scored, ToyDataModule, quiet_trainer

import nemologger as nl
from nemologger.callbacks import PreemptionCallback

# Of each step; validation is after every second one. The best is that of step 4: with a patience of 3, 10 is the end.
SCORES = [9.0, 5.0, 9.0, 3.0, 9.0, 4.0, 9.0, 3.5, 9.0, 3.0, 9.0, 2.0]


def train(directory: Path, *callbacks, stopping: EarlyStopping | None = None, min_steps=None, **options):
    stopping = stopping or EarlyStopping("val_loss", patience=3)
    ckpt = nl.ModelCheckpoint(filename="{step}", every_n_train_steps=2, save_top_k=1, **options)
    trainer = quiet_trainer(max_steps=12, min_steps=min_steps, val_check_interval=2, callbacks=[*callbacks, stopping])
    try:
        nl.train(
            Scored(scores=SCORES),
            ToyDataModule(),
            trainer,
            nl.NeMoLogger(name="toy", log_dir=directory, ckpt=ckpt),
            nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
        )
    except SystemExit as stopped:
        return stopping, stopped.code
    return stopping, trainer.global_step


@pytest.mark.parametrize("at", [("batch", 2), ("batch", 5), ("validation", 6), ("batch", 6), ("validation", 8)])
@pytest.mark.parametrize("options", [{}, {"async_save": True}])
def test_patience_goes_on_counting(tmp_path, at, options):
    straight, end = train(tmp_path / "straight", **options)
    assert end == 10
    assert straight.wait_count == 3
    assert straight.best_score == 3.0
    stopped, code = train(tmp_path / "on", PreemptionCallback(), Watch(*at), **options)
    assert code == 143
    validated = (at[1] + 1 if at[0] == "batch" else at[1]) // 2
    assert stopped.wait_count == max(0, validated - 2)
    resumed, end = train(tmp_path / "on", **options)
    assert end == 10
    assert (resumed.wait_count, resumed.best_score) == (straight.wait_count, straight.best_score)


def test_a_signal_to_a_run_that_is_stopping_early_changes_nothing(tmp_path):
    stopping, end = train(tmp_path, PreemptionCallback(), Watch("validation", 10))
    assert end == 10
    assert stopping.wait_count == 3


def contents(directory: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in directory.rglob("checkpoints/**/*")}


@pytest.mark.parametrize("options", [{}, {"async_save": True}, {"save_last": "link"}])
def test_a_run_that_has_stopped_early_stays_so_when_it_is_started_again(tmp_path, caplog, options):
    train(tmp_path, **options)
    there = contents(tmp_path)
    assert there
    for _ in range(2):
        caplog.clear()
        again, end = train(tmp_path, **options)
        assert end == 10
        assert again.wait_count == 3
        assert contents(tmp_path) == there
        assert "EarlyStopping had ended this run in epoch" in caplog.text
        assert "did not improve in the last 3 records" in caplog.text


def test_what_is_to_be_trained_in_any_case_is_trained_first(tmp_path):
    """The decision is taken at step 10, and the run stopped before it can be followed."""
    straight, end = train(tmp_path / "straight", min_steps=11)
    assert end == 11
    _, code = train(tmp_path / "on", PreemptionCallback(), Watch("validation", 10), min_steps=11)
    assert code == 143
    resumed, end = train(tmp_path / "on", min_steps=11)
    assert end == 11
    assert resumed.wait_count == straight.wait_count


def test_without_the_callback_the_run_goes_on(tmp_path):
    train(tmp_path)
    _, end = train(tmp_path, stopping=EarlyStopping("val_loss", patience=9, mode="max"))
    assert end == 12
