"""What a run goes on from: AutoResume on real checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.toy_lives import found_in, live, ten_steps
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset
from toy import ToyModel, loader, manifests, names, quiet_trainer

from nemologger import (
    AutoResume,
    CheckpointError,
    ConfigurationError,
    DamagedCheckpointError,
    ModelCheckpoint,
    ModelMismatchError,
    NeMoLogger,
    NotFoundError,
    RestoreConfig,
    RunCompletedError,
    Trainer,
)
from nemologger.checkpoint.reading.load import load_model
from nemologger.run.record import close_log


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return ten_steps(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def checkpoints(finished, tmp_path) -> Path:
    """A copy of them to change."""
    return shutil.copytree(finished, tmp_path / "toy" / "checkpoints", symlinks=True)


def test_the_names_and_defaults_are_nemos():
    assert {key: value for key, value in vars(AutoResume()).items() if not key.startswith("_")} == {
        "restore_config": None,
        "resume_from_directory": None,
        "resume_from_path": None,
        "resume_if_exists": False,
        "resume_past_end": False,
        "resume_ignore_no_checkpoint": False,
        "start_from": None,  # ours
        "storage_options": None,
    }


def test_a_run_goes_on_where_it_was(tmp_path):
    _, straight, _ = live(tmp_path / "straight", 15)
    live(tmp_path / "two", 10)
    found, resumed, trainer = live(tmp_path / "two", 15)
    assert found.path is not None
    assert (found.path.name, found.step) == ("step=10-last", 10)
    assert resumed.losses == {step: loss for step, loss in straight.losses.items() if step >= 10}
    assert trainer.global_step == 15


def test_with_fewer_epochs_than_are_done_there_is_nothing_left_to_train_either(tmp_path, caplog):
    epochs = {"check_val_every_n_epoch": 1, "val_check_interval": 1.0}
    quiet_trainer(max_epochs=4, callbacks=[ModelCheckpoint(dirpath=tmp_path)], **epochs).fit(
        ToyModel(), loader(), loader()
    )
    saved, model = names(tmp_path), ToyModel()
    trainer = quiet_trainer(max_epochs=2, callbacks=[ModelCheckpoint(dirpath=tmp_path)], **epochs)
    assert AutoResume(resume_from_directory=tmp_path).setup(trainer, model).finished
    trainer.fit(model, loader(), loader())
    assert model.losses == {}
    assert "nothing is left to train" in caplog.text
    assert names(tmp_path) == saved


def test_nothing_is_left_to_train(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nemologger")
    root = Path(shutil.copytree(finished.parent.parent, tmp_path / "runs"))
    before = names(root / "toy" / "checkpoints")
    found, model, _ = live(root, 10)
    assert found.finished
    assert model.losses == {}
    (warning,) = (one.getMessage() for one in caplog.records if "nothing is left to train" in one.getMessage())
    assert warning.endswith("step=10-last is at step 10, and the trainer stops at max_steps=10: raise that to go on")
    assert "what on_train_epoch_end and on_train_end do has not been done" in caplog.text  # for the log file
    assert names(root / "toy" / "checkpoints") == before


def test_nothing_is_left_to_train_after_the_last_epoch(tmp_path, caplog):
    for expected in (False, True):
        trainer = quiet_trainer(max_epochs=2, check_val_every_n_epoch=1, val_check_interval=1.0)
        log = NeMoLogger(name="toy", log_dir=tmp_path, ckpt=ModelCheckpoint())
        log.setup(trainer, resume_if_exists=True)
        found = AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
        model, ended = ToyModel(), []
        model.on_train_end = partial(ended.append, 1)
        trainer.fit(model, loader(), loader())
        assert found.finished is expected
        assert bool(model.losses) is not expected
        assert ended == [1]  # a run that was killed in front of it has it now
    assert "has not been done" not in caplog.text


def test_more_epochs_go_on(tmp_path):
    losses = []
    for epochs in (2, 3):
        trainer = quiet_trainer(max_epochs=epochs, check_val_every_n_epoch=1, val_check_interval=1.0)
        NeMoLogger(name="toy", log_dir=tmp_path, ckpt=ModelCheckpoint()).setup(trainer, resume_if_exists=True)
        AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
        model = ToyModel()
        trainer.fit(model, loader(), loader())
        losses.append(sorted(model.losses))
    assert losses == [list(range(20)), list(range(20, 30))]


def test_a_path_comes_before_a_directory(checkpoints):
    resume = AutoResume(
        resume_from_path=checkpoints / "step=5", resume_from_directory=checkpoints, resume_if_exists=True
    )
    assert resume.setup(quiet_trainer(max_steps=99)).path == checkpoints / "step=5"
    weights = AutoResume(resume_from_path=checkpoints / "step=5" / "weights")
    assert weights.setup(quiet_trainer(max_steps=99)).path == checkpoints / "step=5"


def test_a_checkpoint_that_is_named_as_the_directory_is_verified(checkpoints):
    assert found_in(checkpoints / "step=5") == checkpoints / "step=5"
    (checkpoints / "step=5" / "weights" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(DamagedCheckpointError, match=r"step=5 is damaged and was not loaded: weights/__0_0.distcp"):
        found_in(checkpoints / "step=5")


def test_a_path_that_is_not_there_is_followed_as_far_as_it_is(checkpoints):
    trainer = quiet_trainer(max_steps=99)
    with pytest.raises(
        NotFoundError, match=r"no checkpoint at .*/step=6\. Beside it there are: step=10, step=10-last, st"
    ):
        AutoResume(resume_from_path=checkpoints / "step=6").setup(trainer)
    wrong = checkpoints.with_name("checkpoint") / "step=5"
    with pytest.raises(NotFoundError, match=rf"at {wrong}: {checkpoints.parent} is there, without 'checkpoint'"):
        AutoResume(resume_from_path=wrong).setup(trainer)
    with pytest.raises(NotFoundError, match=r"manifest\.json \(it is a file\) to resume from"):
        found_in(checkpoints / "step=5" / "manifest.json")


def test_why_a_start_is_refused_is_in_the_log_of_the_run(tmp_path):
    trainer = quiet_trainer(max_steps=99)
    run = NeMoLogger(name="toy", log_dir=tmp_path, ckpt=ModelCheckpoint()).setup(trainer, resume_if_exists=True)
    with pytest.raises(NotFoundError):
        AutoResume(resume_if_exists=True).setup(trainer)
    close_log(trainer)
    assert (
        f"NotFoundError: there is no checkpoint in {run.checkpoint_dir}"
        in (run.log_dir / "nemo_error_log.txt").read_text()
    )


def test_of_a_run_that_is_over_nothing_is_said_of_its_data(tmp_path, caplog):
    for epochs, is_said in ((1, False), (1, False), (2, True)):
        trainer = quiet_trainer(max_epochs=epochs, check_val_every_n_epoch=1, val_check_interval=1.0)
        NeMoLogger(name="toy", log_dir=tmp_path, ckpt=ModelCheckpoint()).setup(trainer, resume_if_exists=True)
        AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
        data = TensorDataset(torch.rand(20, 8))
        collate = lambda rows: torch.stack([x for (x,) in rows])  # noqa: E731
        trainer.fit(ToyModel(), DataLoader(data, batch_size=4, collate_fn=collate), loader())
        assert ("the training data is not what it was" in caplog.text) is is_said


def test_newest_is_by_the_manifest_not_by_mtime(checkpoints):
    os.utime(checkpoints / "step=5")
    os.utime(checkpoints / "step=10", (1, 1))
    shutil.rmtree(checkpoints / "step=10-last")
    assert found_in(checkpoints) == checkpoints / "step=10"


def test_from_scratch_only_when_it_was_allowed(tmp_path, caplog):
    with pytest.raises(NotFoundError, match=r"none \(no such directory\) .*resume_ignore_no_checkpoint=True") as error:
        found_in(tmp_path / "none")
    assert isinstance(error.value, FileNotFoundError)
    assert found_in(tmp_path / "none", resume_ignore_no_checkpoint=True) is None
    assert f"there is no checkpoint in {tmp_path}/none (no such directory): training starts from scratch" in caplog.text
    assert found_in("memory://bucket/none", resume_ignore_no_checkpoint=True) is None  # a store has no directories
    assert "there is no checkpoint in memory://bucket/none: training starts from scratch" in caplog.text


def test_a_completed_run_says_so(checkpoints):
    (checkpoints / "step=10-last").rename(checkpoints / "step=10-end")
    with pytest.raises(RunCompletedError, match="resume_past_end=True"):
        found_in(checkpoints)
    assert found_in(checkpoints, resume_past_end=True) == checkpoints / "step=10-end"


def test_nemos_directories_are_taken_as_nemo_takes_them(tmp_path, caplog):
    for name, mtime in (("a-last", 100), ("b-last", 300), ("c", 500), ("d-last", 900)):
        (tmp_path / name / "weights").mkdir(parents=True)
        os.utime(tmp_path / name, (mtime, mtime))
    (tmp_path / "d-last-unfinished").touch()
    assert found_in(tmp_path) == tmp_path / "b-last"
    assert "cannot be verified" in caplog.text


def test_ours_without_a_manifest_is_damaged_not_nemos(checkpoints):
    for name in ("step=10", "step=10-last"):
        (checkpoints / name / "manifest.json").unlink()
    assert found_in(checkpoints) == checkpoints / "step=5"


@pytest.mark.parametrize("depth", ["toy", "."])
def test_a_directory_of_runs_says_where_the_checkpoints_are(finished, depth):
    with pytest.raises(NotFoundError, match="holds runs, not checkpoints") as error:
        found_in(finished.parent.parent / depth, resume_ignore_no_checkpoint=True)
    assert str(finished) in str(error.value)


def test_the_directory_of_the_checkpoints_is_no_checkpoint_and_says_which_are_in_it(finished):
    with pytest.raises(NotFoundError, match=r"has no weights/\. In it there are: .*step=10"):
        AutoResume(resume_from_path=finished).get_trainer_ckpt_path()


def test_a_run_without_optimizer_at_its_end_goes_on_from_the_newest_that_has_one(tmp_path, caplog):
    live(tmp_path, 12, save_optim_on_train_end=False)
    directory = tmp_path / "toy" / "checkpoints"
    assert not manifests(directory)["step=12-last"].has_optimizer
    found, model, _ = live(tmp_path, 12)
    assert found.finished
    assert model.losses == {}
    found, model, trainer = live(tmp_path, 15)
    assert found.path == directory / "step=12"
    assert "step=12-last is passed over: it holds no optimizer state" in caplog.text
    assert trainer.global_step == 15
    assert min(model.losses) == 12


def test_lightning_itself_is_told_that_the_optimizer_is_missing(tmp_path):
    live(tmp_path, 5, save_optim_on_train_end=False)
    with pytest.raises(CheckpointError, match="RestoreConfig"):
        quiet_trainer(max_steps=9, callbacks=[ModelCheckpoint(dirpath=tmp_path / "x")]).fit(
            ToyModel(), loader(), loader(), ckpt_path=str(tmp_path / "toy" / "checkpoints" / "step=5-last")
        )


def test_a_changed_model_is_refused_by_name(checkpoints):
    with pytest.raises(
        ModelMismatchError, match=r"net\.0\.weight is \(8, 8\) in the checkpoint, \(16, 8\) in the model"
    ):
        live(checkpoints.parent.parent, 15, ToyModel(width=16))
    assert "step=10-last" in names(checkpoints)


def test_the_older_names_keep_working(tmp_path, caplog):
    resume = AutoResume(path="a", dirpath="b", import_path="c")
    assert (resume.resume_from_path, resume.resume_from_directory) == ("a", "b")
    assert resume.restore_config == RestoreConfig(path="c")
    assert len(caplog.records) == 3
    with pytest.raises(ConfigurationError, match="older name"):
        AutoResume(path="a", resume_from_path="b")


def test_paths_of_a_checkpoint(checkpoints):
    resume = AutoResume(resume_from_directory=checkpoints)
    assert resume.get_trainer_ckpt_path() == checkpoints / "step=10-last"
    assert resume.get_context_path() == checkpoints / "step=10-last" / "context"
    assert resume.get_weights_path("x") == Path("x/weights")


def test_a_run_directory_that_is_new_at_every_start_is_warned_of(tmp_path, caplog):
    """Each start trains from scratch, which is as a first one looks."""
    resume = AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)

    def start(**settings):
        trainer = quiet_trainer(max_steps=5)
        try:
            NeMoLogger(name="toy", ckpt=ModelCheckpoint(), **settings).setup(trainer)
            return resume.setup(trainer)
        finally:
            close_log(trainer)

    assert start(log_dir=tmp_path, version="v").path is None
    assert start(log_dir=tmp_path, use_datetime_version=False).path is None
    assert start(explicit_log_dir=tmp_path / "mine").path is None
    assert "for this start alone" not in caplog.text
    assert start(log_dir=tmp_path).path is None
    assert "is for this start alone" in caplog.text
    assert "setup(trainer, resume_if_exists=True)" in caplog.text


@pytest.mark.parametrize("others", [False, True])
def test_checkpoints_of_weights_only_are_nothing_to_go_on_from(tmp_path, caplog, others):
    more = [ModelCheckpoint(dirpath=tmp_path / "all", every_n_train_steps=2)] if others else []
    trainer = quiet_trainer(callbacks=[ModelCheckpoint(dirpath=tmp_path, save_weights_only=True), *more])
    try:
        NeMoLogger(name="x", log_dir=tmp_path).setup(trainer, resume_if_exists=True)
        AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
    finally:
        close_log(trainer)
    assert ("saves no optimizer state" in caplog.text) != others


def test_lightnings_own_files_are_found_too(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint as LightningCheckpoint

    for steps in (4, 8):
        trainer = quiet_trainer(max_steps=steps, val_check_interval=2)
        ckpt = LightningCheckpoint(monitor="val_loss", every_n_train_steps=2, save_last=True)
        NeMoLogger(name="toy", log_dir=tmp_path, ckpt=ckpt).setup(trainer, resume_if_exists=True)
        found = AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
        model = ToyModel()
        trainer.fit(model, loader(), loader())
    assert found.path is not None
    assert found.path.suffix == ".ckpt"
    assert min(model.losses) == 4


def test_a_checkpoint_is_for_one_fit(checkpoints):
    """A validation, or another fit, of the same trainer is of what it has trained since."""
    _, model, trainer = live(checkpoints.parent.parent, 15)
    assert trainer.ckpt_path is None
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.validate(model, loader(), verbose=False)
    assert all(torch.equal(trained[key], value) for key, value in model.state_dict().items())
    trainer.fit_loop.epoch_loop.max_steps = 17
    trainer.fit(model, loader(), loader())
    assert sorted(model.losses) == [*range(10, 17)]


def test_a_tuner_in_between_changes_nothing(checkpoints, tmp_path, monkeypatch):
    """Lightning's puts back what was there before from a file of its own, and leaves the trainer with that file's path."""
    shutil.copytree(checkpoints, tmp_path / "tuned" / "toy" / "checkpoints", symlinks=True)
    _, straight, _ = live(checkpoints.parent.parent, 15)
    fit = Trainer.fit

    def tuned(trainer, model, *data):
        monkeypatch.setattr(Trainer, "fit", fit)
        Tuner(trainer).lr_find(model, *data, num_training=12, update_attr=False)
        model.losses.clear()
        trainer.fit(model, *data)

    monkeypatch.setattr(Trainer, "fit", tuned)
    _, model, _ = live(tmp_path / "tuned", 15)
    assert model.losses == straight.losses
    assert sorted(model.losses) == [*range(10, 15)]


def test_a_directory_that_the_checkpoint_callback_was_given_is_looked_in(tmp_path):
    steps = []
    for limit in (5, 10):
        trainer = quiet_trainer(max_steps=limit)
        ckpt = ModelCheckpoint(dirpath=tmp_path / "mine", filename="{step}", every_n_train_steps=5)
        NeMoLogger(name="toy", log_dir=tmp_path, ckpt=ckpt).setup(trainer, resume_if_exists=True)
        AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
        model = ToyModel()
        trainer.fit(model, loader(), loader())
        steps.append(sorted(model.losses))
    assert steps == [list(range(5)), list(range(5, 10))]


def test_a_callback_that_saves_elsewhere_does_not_say_where_the_run_goes_on(tmp_path):
    ten_steps(tmp_path)
    trainer = quiet_trainer(max_steps=15, callbacks=[OnExceptionCheckpoint(tmp_path / "exceptions")])
    NeMoLogger(name="toy", log_dir=tmp_path, ckpt=ModelCheckpoint()).setup(trainer, resume_if_exists=True)
    found = AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
    close_log(trainer)
    assert found.step == 10


class Scale:
    """An object without a plain form."""


class SavesObjects(ToyModel):
    def __init__(self):
        super().__init__()
        self.scales = {"own": Scale()}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["special"] = {"own": self.scales["own"], "other": Scale()}

    def on_load_checkpoint(self, checkpoint):
        self.loaded = checkpoint["special"]


def test_objects_that_a_hook_saves_are_those_that_the_program_makes(tmp_path, caplog):
    live(tmp_path, 15, SavesObjects())
    assert caplog.text.count("special.other is not saved: a ") == 1
    assert "special.own" not in caplog.text
    _, model, _ = live(tmp_path, 20, SavesObjects())
    assert model.loaded == {"own": model.scales["own"], "other": None}
    assert "does not hold special.other: None takes its place" in caplog.text


def test_not_knowing_where_to_look_is_an_error_not_a_new_run():
    with pytest.raises(ConfigurationError, match=r"NeMoLogger\.setup\(trainer, resume_if_exists=True\) first"):
        AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(quiet_trainer(max_steps=5))


def test_going_back_begins_another_line_that_the_next_start_follows(tmp_path, caplog):
    live(tmp_path, 20, save_top_k=-1)
    directory = tmp_path / "toy" / "checkpoints"
    said = "as every start with it does, although this run has got to"
    live(
        tmp_path,
        21,
        resume=AutoResume(resume_from_path=directory / "step=20-last", resume_if_exists=True),
        save_top_k=-1,
    )
    assert said not in caplog.text  # it is the newest
    back = AutoResume(resume_from_path=directory / "step=10", resume_if_exists=True)
    live(tmp_path, 15, resume=back, save_top_k=-1)
    assert f"{directory / 'step=10'}, {said} {directory / 'step=21'}" in caplog.text
    assert manifests(directory)["step=15-last"].life == 1
    found, model, _ = live(tmp_path, 18, save_top_k=-1)
    assert found.path == directory / "step=15-last"
    assert sorted(model.losses) == [15, 16, 17]
    assert manifests(directory)["step=18-last"].life == 1


def test_a_run_that_died_while_it_replaced_a_checkpoint_goes_on(checkpoints):
    for name in ("step=10", "step=10-last"):
        (checkpoints / name).rename(checkpoints / f"{name}-replaced")
        (checkpoints / name / "weights").mkdir(parents=True)
        (checkpoints / f"{name}-unfinished").touch()
    found, model, _ = live(checkpoints.parent.parent, 12)
    assert found.step == 10
    assert sorted(model.losses) == [10, 11]


def test_validation_needs_no_optimizer_state(tmp_path):
    live(tmp_path, 7, save_optim_on_train_end=False, every_n_train_steps=5)
    trainer = quiet_trainer(max_steps=99)
    directory = tmp_path / "toy" / "checkpoints"
    found = AutoResume(resume_from_directory=directory).setup(trainer, stage="validate")
    assert found.path == directory / "step=7-last"
    model = ToyModel()
    trainer.validate(model, loader(), verbose=False)
    assert torch.equal(model.net[0].weight, load_model(directory / "step=7-last")["net.0.weight"])


def test_validating_changes_nothing_in_the_directory(checkpoints):
    """Another process may be training there."""
    (checkpoints / "step=99" / "weights").mkdir(parents=True)
    (checkpoints / "step=99-unfinished").touch()
    before = names(checkpoints)
    trainer = quiet_trainer(callbacks=[ModelCheckpoint(dirpath=checkpoints)])
    found = AutoResume(resume_if_exists=True).setup(trainer, stage="validate")
    assert found.path == checkpoints / "step=10-last"
    trainer.validate(ToyModel(), loader(), verbose=False)
    assert names(checkpoints) == before


def test_home_directories_are_understood(checkpoints, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoints.parent))
    assert found_in(Path("~/checkpoints")) == checkpoints / "step=10-last"
    resume = AutoResume(resume_from_path="~/checkpoints/step=5")
    assert resume.setup(quiet_trainer(max_steps=99)).path == checkpoints / "step=5"
