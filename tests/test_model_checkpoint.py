"""When ModelCheckpoint saves, and what, on real runs."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
from helpers.saved_run import StopAt, StoppedError, run
from toy import SAMPLES, ToyModel, loader, manifests, names, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint
from nemologger.checkpoint.verify import problems


def test_the_defaults_are_nemos():
    checkpoint = ModelCheckpoint()
    assert (checkpoint.monitor, checkpoint.mode, checkpoint.save_top_k, checkpoint.save_last) == (
        "val_loss",
        "min",
        3,
        True,
    )
    assert checkpoint.verbose
    assert checkpoint.save_optim_on_train_end
    assert checkpoint.always_save_context
    assert checkpoint.save_context_on_train_end
    assert not checkpoint.save_weights_only


def test_a_checkpoint_has_the_layout_and_is_whole(tmp_path):
    run(tmp_path, 5, filename="{val_loss:.2f}-{epoch}-{step}-{consumed_samples}-{model_name}")
    saved, last = names(tmp_path)
    assert last == f"{saved}-last"
    assert saved.startswith("val_loss=")
    assert saved.endswith("-epoch=0-step=5-consumed_samples=20-ToyModel")
    assert {"context", "weights", "manifest.json"} == set(names(tmp_path / saved))
    assert {"common.pt", "metadata.json", ".metadata", "__0_0.distcp", "__0_1.distcp"} == set(
        names(tmp_path / saved / "weights")
    )
    assert {"io.json", "model.yaml"} <= set(names(tmp_path / saved / "context"))
    assert problems(tmp_path / saved) == problems(tmp_path / last) == []


def test_a_metric_that_does_not_exist_yet_is_left_out_of_the_name(tmp_path):
    with pytest.raises(StoppedError):
        run(
            tmp_path, 9, filename="run--{val_loss:.4f}-{epoch}-{step}", every_n_train_steps=2,
            trainer={"val_check_interval": 3}, others=[StopAt(2)],
        )  # fmt: skip
    assert names(tmp_path) == ["run--epoch=0-step=2-last"]


def test_the_final_state_is_saved_off_the_interval_and_goes_on_in_the_middle_of_the_epoch(tmp_path):
    checkpoint, _ = run(tmp_path, 13)
    assert Path(checkpoint.last_model_path).name == "step=13-last"
    assert manifests(tmp_path)["step=13-last"].epoch == 1  # ten steps an epoch: the fourth of the second
    checkpoint, _ = run(tmp_path, 16, resume=checkpoint.last_model_path)
    assert manifests(tmp_path)["step=16-last"].epoch == 1


def test_without_optimizer_at_the_end(tmp_path):
    run(tmp_path, 5, save_optim_on_train_end=False)
    saved = manifests(tmp_path)
    assert saved["step=5"].has_optimizer
    assert not saved["step=5-last"].has_optimizer
    assert names(tmp_path) == ["step=5", "step=5-last"]


def test_weights_only(tmp_path):
    run(tmp_path, 5, save_weights_only=True)
    assert not any(m.has_optimizer for m in manifests(tmp_path).values())


def test_samples_are_counted_from_the_batches(tmp_path):
    run(tmp_path, 12, trainer={"accumulate_grad_batches": 2})
    # 24 batches of 4; ten batches an epoch
    assert manifests(tmp_path)["step=12-last"].consumed_samples == 96
    run(tmp_path, 14, resume=str(tmp_path / "step=12-last"), trainer={"accumulate_grad_batches": 2})
    assert manifests(tmp_path)["step=14-last"].consumed_samples == 112


def test_epochs_are_counted(tmp_path):
    run(
        tmp_path, -1, every_n_train_steps=None, every_n_epochs=1, filename="{epoch}", save_top_k=-1,
        trainer={"max_epochs": 3, "check_val_every_n_epoch": 1, "val_check_interval": 1.0},
    )  # fmt: skip
    saved = manifests(tmp_path)
    assert [name for name in saved if not name.endswith("last")] == ["epoch=0", "epoch=1", "epoch=2"]
    assert [saved[f"epoch={e}"].epochs_done for e in range(3)] == [1, 2, 3]
    assert saved["epoch=2"].consumed_samples == 3 * SAMPLES


def test_a_time_interval_saves_without_steps(tmp_path):
    run(
        tmp_path,
        4,
        every_n_train_steps=None,
        train_time_interval=timedelta(0),
        trainer={"val_check_interval": 1},
        save_top_k=-1,
    )
    assert names(tmp_path) == ["step=1", "step=2", "step=3", "step=4", "step=4-last"]


def test_at_the_end_of_training_epochs(tmp_path):
    run(
        tmp_path, -1, monitor="train_loss", every_n_train_steps=None, every_n_epochs=1, save_on_train_epoch_end=True,
        trainer={"max_epochs": 2, "check_val_every_n_epoch": 1, "val_check_interval": 1.0},
    )  # fmt: skip
    assert names(tmp_path) == ["step=10", "step=20", "step=20-last"]


def test_validation_that_never_runs_is_an_error_before_the_first_step(tmp_path):
    model = ToyModel()
    with pytest.raises(ConfigurationError, match="can never appear"):
        run(tmp_path, 3, model, trainer={"val_check_interval": 5})
    with pytest.raises(ConfigurationError, match="no validation data"):
        quiet_trainer(max_steps=5, callbacks=[ModelCheckpoint(dirpath=tmp_path)]).fit(model, loader())
    assert model.losses == {}


def test_resuming_restores_everything_lightning_keeps(tmp_path):
    _, straight = run(tmp_path / "a", 20)
    first, _ = run(tmp_path / "b", 10)
    _, resumed = run(tmp_path / "b", 20, resume=first.last_model_path)
    assert {step: loss for step, loss in straight.losses.items() if step >= 10} == resumed.losses


def test_fast_dev_run_saves_nothing(tmp_path):
    run(tmp_path / "x", 5, trainer={"fast_dev_run": True})
    assert not (tmp_path / "x").exists()


def test_early_stopping_can_be_resumed(tmp_path):
    def live(steps: int, resume: str | None) -> pl.Trainer:
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}")
        stopping = pl.callbacks.EarlyStopping("val_loss", patience=100)
        trainer = quiet_trainer(
            max_epochs=steps, check_val_every_n_epoch=1, val_check_interval=1.0, callbacks=[stopping, checkpoint]
        )
        trainer.fit(ToyModel(), loader(), loader(), ckpt_path=resume)
        return trainer

    live(1, None)
    # as after a crash: the checkpoint of the last validation, before the epoch's end
    assert live(3, str(tmp_path / "step=10")).global_step == 30


def test_without_validation_every_epoch_is_saved(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", monitor=None, save_top_k=-1, save_last=False)
    trainer = quiet_trainer(max_epochs=3, check_val_every_n_epoch=1, val_check_interval=1.0, callbacks=[checkpoint])
    trainer.fit(ToyModel(), loader())
    assert names(tmp_path) == ["epoch=0", "epoch=1", "epoch=2"]


def test_nothing_is_saved_in_the_middle_of_gradient_accumulation(tmp_path):
    run(
        tmp_path, 3, every_n_train_steps=None, train_time_interval=timedelta(0), save_top_k=-1, monitor="train_loss",
        trainer={"accumulate_grad_batches": 2, "val_check_interval": 100, "limit_val_batches": 0},
    )  # fmt: skip
    # each of the three steps took two batches of four, and was saved once, after the second
    assert {m.consumed_samples for m in manifests(tmp_path).values()} == {8, 16, 24}


def test_a_save_after_validation_in_the_middle_of_gradient_accumulation_waits_for_the_step(tmp_path):
    """Validation runs after batches 3, 6 and 9; steps end with batches 2, 4, 6, 8 and 10."""
    trainer = {"accumulate_grad_batches": 2, "val_check_interval": 3, "check_val_every_n_epoch": 1}
    options = {"trainer": trainer, "save_top_k": -1, "every_n_train_steps": None, "every_n_epochs": 1}
    _, straight = run(tmp_path / "straight", 7, **options)
    saved = {m.step: name for name, m in manifests(tmp_path / "straight").items() if not name.endswith("-last")}
    assert set(saved) == {2, 3, 5, 7}
    _, resumed = run(tmp_path / "resumed", 7, resume=str(tmp_path / "straight" / saved[2]), **options)
    assert resumed.losses
    assert {step: straight.losses[step] for step in resumed.losses} == resumed.losses


def test_starting_from_scratch_where_an_earlier_run_was_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "nemologger")
    run(tmp_path, 20)
    assert "starts from scratch" not in caplog.text
    caplog.clear()
    run(tmp_path, 5)
    assert (
        f"{tmp_path} holds checkpoints of an earlier run, up to step 20, and this one starts from scratch"
        in caplog.text
    )
    assert "AutoResume(resume_if_exists=True)" in caplog.text
    saved = [record.getMessage() for record in caplog.records if ": saved " in record.getMessage()]
    assert saved
    assert all(message.startswith(f"step 5: saved {tmp_path}/step=5") for message in saved)
    caplog.clear()
    run(tmp_path, 10, resume=str(tmp_path / "step=5-last"))
    assert "starts from scratch" not in caplog.text
