"""A disk that is full or a directory that is gone: our files lose no row that can still be written."""

from __future__ import annotations

import csv
import json
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from toy import ToyDataModule, ToyModel, names, quiet_trainer

import nemologger as nl
from nemologger.run.directory import RunDirectory
from nemologger.trackers import ContinuedSteps, CSVLogger, DLLogger


@contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to let a file grow over ``size`` bytes, as it does on a full disk: in the middle of a write."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def settled(logger, directory: Path):
    logger.settle(RunDirectory(directory, directory, "", ""), move=True)
    return logger


def rows(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


EXPECTED = [(str(step), str(step / 2)) for step in range(6)]


def test_rows_of_a_full_disk_are_written_later(tmp_path, caplog):
    logger = settled(CSVLogger(), tmp_path)
    logger.log_metrics({"loss": 0.0}, 0)
    logger.save()
    with files_of_at_most((tmp_path / "metrics.csv").stat().st_size + 10):
        for step in (1, 2, 3):
            logger.log_metrics({"loss": step / 2}, step)
        logger.save()
        assert rows(tmp_path / "metrics.csv") == EXPECTED[:1]  # none of them, and no half one
        logger.log_metrics({"loss": 2.0, "new": 1.0}, 4)
        with pytest.raises(OSError, match="too large"):
            logger.experiment.save()  # a new column: the whole file is written anew
        assert rows(tmp_path / "metrics.csv") == EXPECTED[:1]
    logger.log_metrics({"loss": 2.5}, 5)
    logger.finalize("success")
    assert rows(tmp_path / "metrics.csv") == EXPECTED
    assert names(tmp_path) == ["metrics.csv"]
    assert caplog.text.count("Training goes on") == 1


def test_lines_of_a_full_disk_are_written_later(tmp_path):
    logger, file = settled(DLLogger(), tmp_path), tmp_path / "dllogger.json"
    logger.log_metrics({"loss": 0.0}, 0)
    with files_of_at_most(file.stat().st_size + 10):
        for step in (1, 2):
            logger.log_metrics({"loss": step / 2}, step)
        assert file.read_text().count("\n") == file.read_text().count("DLLL") == 1
    logger.log_metrics({"loss": 1.5}, 3)
    logger.finalize("success")
    entries = [json.loads(line.removeprefix("DLLL ")) for line in file.read_text().splitlines()]
    assert [(entry["step"], entry["data"]["loss"]) for entry in entries] == [(s, s / 2) for s in range(4)]


@pytest.mark.parametrize("tracker", [CSVLogger, DLLogger])
def test_a_directory_that_is_gone_is_made_again(tmp_path, tracker):
    logger = settled(tracker(), tmp_path / "run")
    for step in range(4):
        logger.log_metrics({"loss": step / 2}, step)
        logger.save()
        if step == 1:
            shutil.rmtree(tmp_path / "run")
    logger.finalize("success")
    (file,) = (tmp_path / "run").iterdir()
    assert [f'"step": {step},' in file.read_text() or f"{step},{step / 2}" in file.read_text() for step in range(4)] == [
        False, False, True, True,
    ]  # fmt: skip


def test_a_run_whose_tracker_cannot_write_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("no directory")
    trainer = quiet_trainer(max_steps=6, log_every_n_steps=1)
    trackers = [CSVLogger(save_dir=tmp_path / "file" / "x"), DLLogger(json_file=str(tmp_path / "file" / "x.json"))]
    checkpoint = nl.ModelCheckpoint(filename="{step}", every_n_train_steps=3)
    nl.NeMoLogger(name="n", log_dir=tmp_path, version="v", ckpt=checkpoint, extra_loggers=trackers).setup(trainer)
    trainer.fit(ToyModel(), ToyDataModule())
    assert trainer.global_step == 6
    assert "step=6-last" in names(tmp_path / "n" / "v" / "checkpoints")
    for name in ("CSVLogger", "DLLogger"):
        assert caplog.text.count(f"{name} fails") == 1
        assert f"{name} is left" in caplog.text


class Unwritable(pl.Callback):
    """``directory`` cannot be written to from step 3 to step 6."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.aside = directory, directory.with_name("aside")

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            self.directory.rename(self.aside)
            self.directory.write_text("no directory")
        if trainer.global_step == 6:
            self.directory.unlink()
            self.aside.rename(self.directory)


@pytest.fixture
def ninth_file_of_this_process(monkeypatch):
    """The next event file's name ends with 9, and the one after it with 10: as text, 10 is before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))


@pytest.mark.usefixtures("ninth_file_of_this_process")
def test_tensorboard_has_every_step_once_though_it_could_not_write_for_a_while(tmp_path, caplog):
    curves = tmp_path / "tb" / "n" / "v"
    trainer = quiet_trainer(max_steps=10, log_every_n_steps=1, callbacks=[Unwritable(curves)])
    log = nl.NeMoLogger(name="n", log_dir=tmp_path, version="v", tensorboard=TensorBoardLogger("tb", name="n"))
    log.setup(trainer)
    trainer.fit(ToyModel(), ToyDataModule())
    assert trainer.global_step == 10
    events = EventAccumulator(str(curves))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [*range(10)]
    assert [event.step for event in events.Scalars("val_loss")] == [4, 9]
    assert caplog.text.count("TensorBoardLogger fails (metrics of step 3)") == 1
    assert "TensorBoardLogger is left. Nothing is lost" in caplog.text


def test_a_tensorboard_that_is_given_up_says_why(tmp_path, caplog):
    """Lightning says of every error that the values cannot be logged."""
    trainer = quiet_trainer(max_steps=5, log_every_n_steps=1, callbacks=[Unwritable(tmp_path / "tb" / "n" / "v")])
    log = nl.NeMoLogger(name="n", log_dir=tmp_path, version="v", tensorboard=TensorBoardLogger("tb", name="n"))
    log.setup(trainer)
    trainer.fit(ToyModel(), ToyDataModule())
    assert "TensorBoardLogger: gave up metrics of step 3: FileExistsError" in caplog.text
    assert "you tried to log" not in caplog.text


def test_what_the_program_does_wrong_is_its_own_error_and_no_outage(tmp_path):
    class Wrong(ToyModel):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"loss": object()}, 0)
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(max_steps=3, logger=True)
    nl.NeMoLogger(name="n", log_dir=tmp_path, version="v").setup(trainer)
    with pytest.raises(ValueError, match="you tried to log"):
        trainer.fit(Wrong(), ToyDataModule())
    assert not {"log_metrics", "save"} & {*trainer.logger.__dict__}


class Foreign(Logger):
    """Somebody else's logger, which fails after each save."""

    name, version = "foreign", 0

    def __init__(self) -> None:
        super().__init__()
        self.saved = 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def after_save_checkpoint(self, checkpoint_callback):
        self.saved += 1
        raise ConnectionError("gone away")

    def finalize(self, status):
        raise ConnectionError(f"gone away: {status}")


def test_any_logger_that_fails_after_a_save_is_left_and_the_others_are_told(tmp_path, caplog):
    loggers = [Foreign(), Foreign()]
    checkpoint = nl.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_last=False)
    callbacks = [checkpoint, ContinuedSteps()]
    trainer = quiet_trainer(max_steps=4, val_check_interval=2, logger=loggers, callbacks=callbacks)
    trainer.fit(ToyModel(), ToyDataModule())
    assert [logger.saved for logger in loggers] == [2, 2]
    assert names(tmp_path) == ["step=2", "step=4"]
    assert caplog.text.count("Foreign failed after checkpoint") == 4
    assert caplog.text.count("Foreign could not be ended") == 2
    assert "finalize" not in loggers[0].__dict__


class Broken(ToyModel):
    def on_train_batch_start(self, *_):
        raise SystemExit(7)


def test_a_logger_that_cannot_be_ended_does_not_replace_the_exit_code(tmp_path, caplog):
    trainer = quiet_trainer(max_steps=5)
    foreign, ckpt = Foreign(), nl.ModelCheckpoint(save_on_exception=True)
    nl.NeMoLogger(name="n", log_dir=tmp_path, version="v", ckpt=ckpt, extra_loggers=[foreign]).setup(trainer)
    with pytest.raises(SystemExit) as end:
        trainer.fit(Broken(), ToyDataModule())
    assert end.value.code == 7
    assert "gone away: failed" in caplog.text
