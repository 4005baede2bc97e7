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


def train(directory: Path, *callbacks, **options):
    stopping = EarlyStopping("val_loss", patience=3)
    ckpt = nl.ModelCheckpoint(filename="{step}", every_n_train_steps=2, save_top_k=1, **options)
    trainer = quiet_trainer(max_steps=12, val_check_interval=2, callbacks=[*callbacks, stopping])
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
