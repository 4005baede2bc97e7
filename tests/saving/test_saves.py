"""Saves that fail, metrics that are missing, and saves that somebody asks for now."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.saved_run import run
from toy import Scored, ToyModel, loader, names, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint, SaveFailedError, lightning_port
from nemologger.callbacks import EMA
from nemologger.disk import LocalDisk
from nemologger.disk.lock import FILE
from nemologger.ranks import SingleProcess


class _FullDisk(LocalDisk):
    """Has no space while ``full``."""

    full = False

    def write(self, path, parts):
        if self.full and path.suffix == ".distcp":
            raise OSError(28, "No space left on device", str(path))
        super().write(path, parts)

    def commit(self, path, content):
        if self.full:
            raise OSError(28, "No space left on device", str(path))
        super().commit(path, content)


class _FillUp(pl.Callback):
    def __init__(self, disk: _FullDisk, steps: range) -> None:
        self.disk, self.steps = disk, steps

    def on_train_batch_start(self, trainer, *args):
        self.disk.full = trainer.global_step in self.steps


def test_a_failed_save_is_loud_and_training_goes_on(tmp_path, caplog):
    disk = _FullDisk()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, disk=disk, save_top_k=-1)
    trainer = quiet_trainer(max_steps=6, val_check_interval=1, callbacks=[_FillUp(disk, range(2, 4)), checkpoint])
    with caplog.at_level(logging.ERROR):
        trainer.fit(ToyModel(), loader(), loader())
    failed = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(failed) == 2
    assert "No space left on device" in failed[0]
    assert names(tmp_path) == ["step=1", "step=2", "step=5", "step=6", "step=6-last"]


class _TakeAway(pl.Callback):
    """Moves the directory of checkpoints away before step 4, and puts ``instead`` there."""

    def __init__(self, directory, instead) -> None:
        self.directory, self.instead = directory, instead

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 4:
            self.directory.rename(self.directory.with_name("moved"))
            self.instead(self.directory)


@pytest.mark.parametrize("instead", [lambda path: None, lambda path: path.mkdir()], ids=["gone", "empty"])
def test_checkpoints_that_are_gone_keep_no_other_from_being_saved(tmp_path, caplog, instead):
    """As when a disk is no longer mounted: the best ones were on it, and what is saved now is not among them."""
    directory = tmp_path / "checkpoints"
    settings = {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": 2, "save_last": False}
    checkpoint = ModelCheckpoint(dirpath=directory, **settings)
    trainer = quiet_trainer(max_steps=8, val_check_interval=1, callbacks=[_TakeAway(directory, instead), checkpoint])
    trainer.fit(Scored(scores=[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]), loader(), loader())
    assert names(directory) == ["step=7", "step=8"]
    assert "2 of the 2 checkpoints that were kept there" in caplog.text
    assert checkpoint.best_model_path == str(directory / "step=8")


def test_a_file_in_place_of_the_directory_is_named_and_the_third_save_that_fails_ends_the_run(tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    checkpoint = ModelCheckpoint(dirpath=directory / "a", filename="{step}", every_n_train_steps=1)
    taken = _TakeAway(directory, lambda path: path.write_text("not a directory"))
    trainer = quiet_trainer(max_steps=20, val_check_interval=1, callbacks=[taken, checkpoint])
    with pytest.raises(SaveFailedError, match=r"step=7 was not saved: .*checkpoints is no directory"):
        trainer.fit(ToyModel(), loader(), loader())
    assert [r.levelno for r in caplog.records if "that may fail" in r.getMessage()] == [logging.ERROR] * 2


class _Unlock(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        lock = Path(trainer.checkpoint_callback.dirpath) / FILE
        assert lock.exists()
        lock.unlink()


def test_a_save_takes_the_lock_of_its_directory_again(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, monitor=None)
    quiet_trainer(max_steps=3, callbacks=[_Unlock(), checkpoint]).fit(ToyModel(), loader(), loader())


class _Litter(pl.Callback):
    """Looks, after each step, for tensors that nobody but the garbage collector would free."""

    def __init__(self) -> None:
        self.found: list[tuple[int, torch.Size]] = []

    def on_train_start(self, trainer, pl_module):
        gc.collect()
        gc.freeze()  # what is there now is looked at no more: that takes long
        gc.set_debug(gc.DEBUG_SAVEALL)

    def on_train_batch_end(self, trainer, *args):
        gc.collect()
        tensors = [thing for thing in gc.garbage if issubclass(type(thing), torch.Tensor)]
        self.found += [(trainer.global_step, tensor.shape) for tensor in tensors]
        gc.garbage.clear()

    def on_train_end(self, trainer, pl_module):
        gc.set_debug(0)
        gc.unfreeze()


@pytest.mark.parametrize("beside", [False, True])
def test_a_save_leaves_no_tensors_to_the_garbage_collector(tmp_path, caplog, beside):
    """It runs rarely, and until then they keep their memory: copies that were saved, and the batch of that step."""
    disk, litter = _FullDisk(), _Litter()
    ckpt = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, monitor=None, disk=disk, async_save=beside)
    trainer = quiet_trainer(max_steps=7, callbacks=[EMA(), _FillUp(disk, range(3, 5)), ckpt, litter])
    trainer.fit(ToyModel(), loader(), loader())
    assert "No space left on device" in caplog.text
    assert litter.found == []


def test_too_many_failed_saves_in_a_row_raise(tmp_path):
    disk = _FullDisk()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, disk=disk)
    trainer = quiet_trainer(max_steps=9, val_check_interval=1, callbacks=[_FillUp(disk, range(2, 9)), checkpoint])
    with pytest.raises(
        SaveFailedError, match=r"No space left.*save 3 in a row that failed.*newest checkpoint is .*step=2\."
    ):
        trainer.fit(ToyModel(), loader(), loader())
    assert trainer.global_step == 5  # 3, 4 and 5 failed
    assert "step=2-last" in names(tmp_path)


def test_a_failed_final_save_raises(tmp_path):
    disk = _FullDisk()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, disk=disk)
    trainer = quiet_trainer(max_steps=5, val_check_interval=1, callbacks=[_FillUp(disk, range(4, 9)), checkpoint])
    with pytest.raises(SaveFailedError):
        trainer.fit(ToyModel(), loader(), loader())
    assert "step=4-last" in names(tmp_path)


def test_a_metric_that_nobody_logs_is_an_error_after_the_first_validation_and_costs_nothing(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no such metric was logged.*train_loss") as error:
        run(tmp_path, 10, monitor="val_acc")
    assert "step=5-last" in str(error.value)
    assert names(tmp_path) == ["step=5-last"]


def test_without_validation_a_metric_that_nobody_logs_is_told_once(tmp_path, caplog):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="trainloss", filename="{step}", every_n_train_steps=2)
    trainer = quiet_trainer(max_steps=6, callbacks=[checkpoint])
    trainer.fit(ToyModel(), loader())
    told = [record.getMessage() for record in caplog.records if "'trainloss'" in record.getMessage()]
    assert len(told) == 1
    assert "step=2-last is kept as the newest, not as one of the best" in told[0]
    assert "'train_loss'" in told[0]
    assert names(tmp_path) == ["step=6-last"]


@pytest.mark.parametrize("validates", [False, True])
def test_a_field_of_the_name_that_nobody_logs_is_told_once(tmp_path, caplog, validates):
    """With validation, not before the first one."""
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, monitor=None, filename="{step}-{vall_loss:.2f}-{train_loss:.0f}", every_n_train_steps=2
    )
    trainer = quiet_trainer(max_steps=6, val_check_interval=4, callbacks=[checkpoint])
    trainer.fit(ToyModel(), loader(), loader() if validates else None)
    told = [record.getMessage() for record in caplog.records if "filename=" in record.getMessage()]
    assert len(told) == 1
    assert "nobody has logged 'vall_loss' yet" in told[0]
    assert ("'val_loss'" in told[0]) == validates
    assert "'train_loss'" in told[0]


@pytest.mark.parametrize("beside", [False, True])
def test_save_now_keeps_what_nobody_asked_for_until_the_next_save(tmp_path, beside):
    """Of a moment that is neither among the best nor to be the last one."""
    seen = {}

    class Now(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            lightning_port.move_to_end(trainer, self)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 7:
                trainer.checkpoint_callback.save_now(trainer)
                trainer.checkpoint_callback.save_now(trainer)
            if trainer.global_step >= 6:
                seen[trainer.global_step] = [name for name in names(tmp_path) if not name.startswith(".")]

    scores = [9.0, 9.0, 1.0, 9.0, 9.0, 2.0, 9.0, 9.0, 0.5]
    ckpt = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", save_top_k=1, save_last=False, every_n_train_steps=3, async_save=beside
    )
    trainer = quiet_trainer(max_steps=9, val_check_interval=3, callbacks=[ckpt, Now()])
    trainer.fit(Scored(scores=scores), loader(), loader())
    assert seen[7] == ["step=3", "step=7-last"]
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["step=9"]


def test_that_nobody_knows_whether_all_ranks_have_stopped_is_said(caplog):
    """Rank 0's host has gone, say, and the store with it: that all others have stopped cannot be told."""

    class Silent(SingleProcess):
        def missing_at(self, point, seconds):
            return None

    checkpoint = ModelCheckpoint()
    checkpoint._ranks = Silent()
    assert not checkpoint._all_have_stopped(quiet_trainer())
    assert "whether all ranks have stopped is not known" in caplog.text
    assert "did not stop" not in caplog.text
