from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from toy import ToyDataModule, ToyModel, loader, quiet_trainer

import nemologger as nl
from nemologger.run.directory import RunDirectory
from nemologger.run.record import close_log
from nemologger.trackers import ContinuedSteps, CSVLogger, DLLogger


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logger_in(directory: Path, **options) -> CSVLogger:
    logger = CSVLogger(**options)
    logger.settle(RunDirectory(directory, directory, "", ""), move=True)
    return logger


def test_it_goes_on_before_the_step_that_comes_again(tmp_path):
    first = logger_in(tmp_path)
    for step in range(8):
        first.log_metrics({"loss": torch.tensor(step / 2), "epoch": 0}, step)
    first.save()
    second = logger_in(tmp_path)
    second.go_on(5)
    second.log_metrics({"loss": 9.5, "epoch": 0}, 5)
    second.save()
    assert [(row["step"], row["loss"]) for row in table(tmp_path / "metrics.csv")] == [
        *((str(step), str(step / 2)) for step in range(5)),
        ("5", "9.5"),
    ]


def test_steps_that_only_the_model_knows_are_left_out_when_they_come_again(tmp_path):
    first = logger_in(tmp_path, prefix="p")
    for step in (100, 250):
        first.log_metrics({"loss": 0.5}, step)
    first.save()
    second = logger_in(tmp_path, prefix="p")
    second.go_on(None)
    for step in (250, 300):
        second.log_metrics({"loss": 0.5}, step)
    second.log_metrics({"new": 0.5}, 250)
    second.save()
    rows = table(tmp_path / "metrics.csv")
    assert [(row["step"], row["p-loss"]) for row in rows] == [
        ("100", "0.5"),
        ("250", "0.5"),
        ("300", "0.5"),
        ("250", ""),
    ]


class AlsoTested(ToyModel):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.net(batch).mean())


def test_what_was_tested_after_a_fit_stays_when_the_run_gets_more_steps(tmp_path):
    for steps in (4, 8):
        trainer = quiet_trainer(max_steps=steps, val_check_interval=4, log_every_n_steps=1)
        nl.NeMoLogger(
            name="n", log_dir=tmp_path, version="v", ckpt=nl.ModelCheckpoint(), extra_loggers=[CSVLogger(), DLLogger()]
        ).setup(trainer, resume_if_exists=True)
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
        model = AlsoTested()
        trainer.fit(model, ToyDataModule())
        trainer.test(model, loader(), verbose=False)
    rows = table(tmp_path / "n" / "v" / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["test_loss"]] == [4, 8]
    assert [int(row["step"]) for row in rows if row["train_loss"]] == [*range(8)]
    lines = (tmp_path / "n" / "v" / "dllogger.json").read_text().splitlines()
    entries = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    assert [entry["step"] for entry in entries if "test_loss" in entry["data"]] == [4, 8]
    assert [entry["step"] for entry in entries if "train_loss" in entry["data"]] == [*range(8)]


def test_of_the_step_that_comes_again_a_row_goes_when_its_metrics_are_there(tmp_path):
    first = logger_in(tmp_path)
    for metrics, step in (({"a": 1.0}, 1), ({"a": 2.0}, 2), ({"b": 2.0}, 2), ({"c": 2.0}, 2), ({"a": 3.0}, 3)):
        first.log_metrics({**metrics, "epoch": 0}, step)
    first.save()
    second = logger_in(tmp_path)
    second.go_on(2)
    for metrics, step in (({"a": 2.5}, 2), ({"d": 2.5}, 2), ({"b": 2.5}, 2), ({"b": 2.6}, 2), ({"a": 3.5}, 3)):
        second.log_metrics({**metrics, "epoch": 0}, step)
        second.save()
    rows = [{key: row[key] for key in "stepabcd" if row.get(key)} for row in table(tmp_path / "metrics.csv")]
    assert rows == [{"a": "1.0"}, {"c": "2.0"}, {"a": "2.5"}, {"d": "2.5"}, {"b": "2.5"}, {"b": "2.6"}, {"a": "3.5"}]


class OfEpochs(ToyModel):
    """Logs by epoch, in validation under the same name, and fails at the step ``stop``."""

    stop = 0

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop:
            raise RuntimeError("stopped")
        loss = super().training_step(batch, batch_idx)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("epoch_loss", self.net(batch).mean())


def test_an_epoch_that_ended_after_its_checkpoint_is_logged_once(tmp_path):
    def train(name: str, stop: int = 0) -> None:
        trainer = quiet_trainer(max_epochs=2, log_every_n_steps=1)
        loggers = [CSVLogger(), DLLogger()]
        log = nl.NeMoLogger(name=name, log_dir=tmp_path, version="v", ckpt=nl.ModelCheckpoint(), extra_loggers=loggers)
        log.setup(trainer, resume_if_exists=True)
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
        model = OfEpochs()
        model.stop = stop or -1
        trainer.fit(model, ToyDataModule())

    train("straight")
    with pytest.raises(RuntimeError, match="stopped"):
        train("stopped", stop=12)
    train("stopped")
    straight, stopped = (table(tmp_path / name / "v" / "metrics.csv") for name in ("straight", "stopped"))
    assert [row["step"] for row in straight if row["epoch_loss"]] == ["4", "9", "9", "14", "19", "19"]
    assert stopped == straight
    straight, stopped = (
        [json.loads(line.removeprefix("DLLL ")) for line in path.read_text().splitlines()]
        for path in (tmp_path / name / "v" / "dllogger.json" for name in ("straight", "stopped"))
    )
    assert [(entry["step"], entry["data"]) for entry in stopped] == [
        (entry["step"], entry["data"]) for entry in straight
    ]


def test_new_metrics_are_new_columns_on_the_right(tmp_path):
    logger = logger_in(tmp_path)
    logger.log_metrics({"b": 1.0}, 0)
    logger.save()
    logger.log_metrics({"b": 2.0, "a": 3.0}, 1)
    logger.log_metrics({"c, with a comma": 4.0}, 1)
    logger.save()
    resumed = logger_in(tmp_path)
    resumed.go_on(2)
    resumed.log_metrics({"z": 5.0}, 2)
    resumed.save()
    assert (tmp_path / "metrics.csv").read_text() == (
        'step,b,a,"c, with a comma",z\n0,1.0,,,\n1,2.0,3.0,,\n1,,,4.0,\n2,,,,5.0\n'
    )


@pytest.mark.parametrize("told", [True, False])
def test_a_row_that_a_killed_process_did_not_finish_is_dropped(tmp_path, told):
    (tmp_path / "metrics.csv").write_text("step,loss\n0,0.5\n1,0.2")
    logger = logger_in(tmp_path)
    if told:
        logger.go_on(2)
    logger.log_metrics({"loss": 0.7}, 2)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n0,0.5\n2,0.7\n"


def test_a_run_that_starts_over_puts_the_earlier_file_aside(tmp_path):
    for life in range(3):
        logger = logger_in(tmp_path)
        logger.start_over()
        logger.log_metrics({"loss": float(life)}, 0)
        logger.save()
    files = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert files == {
        "metrics-0.csv": "step,loss\n0,0.0\n",
        "metrics-1.csv": "step,loss\n0,1.0\n",
        "metrics.csv": "step,loss\n0,2.0\n",
    }


def test_a_file_of_somebody_else_is_put_aside(tmp_path):
    (tmp_path / "metrics.csv").write_text("name,amount\nx,1\n")
    logger = logger_in(tmp_path)
    logger.go_on(0)
    logger.log_metrics({"loss": 0.5}, 0)
    logger.save()
    assert (tmp_path / "metrics-0.csv").read_text() == "name,amount\nx,1\n"
    assert table(tmp_path / "metrics.csv") == [{"step": "0", "loss": "0.5"}]


def test_nothing_is_made_before_something_is_logged(tmp_path):
    logger = logger_in(tmp_path / "run")
    logger.go_on(3)
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, "run"),
        ({"save_dir": "csv", "name": "n", "version": 3}, "run/csv/n/version_3"),
        ({"save_dir": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_where_it_writes(tmp_path, options, where):
    assert Path(logger_in(tmp_path / "run", **options).log_dir) == tmp_path / where


def test_the_prefix_is_lightnings(tmp_path):
    logger = logger_in(tmp_path, prefix="p")
    logger.log_metrics({"loss": 0.5}, 0)
    logger.finalize("success")
    assert table(tmp_path / "metrics.csv") == [{"step": "0", "p-loss": "0.5"}]


def fit(directory: Path, steps: int, *, ckpt_path: str | None = None, **trainer) -> list[int]:
    """Without a NeMoLogger."""
    logger = CSVLogger(save_dir=directory)
    training = quiet_trainer(
        max_steps=steps,
        logger=logger,
        log_every_n_steps=1,
        limit_val_batches=0,
        callbacks=[ContinuedSteps(), pl.callbacks.ModelCheckpoint(directory, "{step}", every_n_train_steps=4)],
        **trainer,
    )
    training.fit(ToyModel(), ToyDataModule(), ckpt_path=ckpt_path)
    return [int(row["step"]) for row in table(directory / "metrics.csv")]


def test_with_a_plain_trainer_and_the_callback(tmp_path):
    assert fit(tmp_path, 7) == [*range(7)]
    assert fit(tmp_path, 10, ckpt_path=str(tmp_path / "step=4.ckpt")) == [*range(10)]
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text())["width"] == 8


def test_a_nemologger_tells_it_the_directory_and_the_second_fit_goes_on(tmp_path):
    logger = CSVLogger()
    trainer = quiet_trainer(max_steps=3, logger=logger, log_every_n_steps=1, limit_val_batches=0)
    run = nl.NeMoLogger(name="n", log_dir=tmp_path, version="v").setup(trainer)
    model = ToyModel()
    trainer.validate(model, ToyDataModule(), verbose=False)
    trainer.fit(model, ToyDataModule())
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(model, ToyDataModule())
    rows = table(run.log_dir / "metrics.csv")
    assert [int(row["step"]) for row in rows if row.get("train_loss")] == [*range(5)]
    assert (run.log_dir / "hparams.yaml").is_file()
    assert len([*run.log_dir.glob("metrics*")]) == 1


def test_one_that_is_open_already_stays_and_is_named(tmp_path, caplog):
    logger = CSVLogger(save_dir=tmp_path / "own")
    logger.log_metrics({"a": 1.0}, 0)
    trainer = quiet_trainer(logger=False)
    nl.NeMoLogger(log_dir=tmp_path / "exp", extra_loggers=[logger]).setup(trainer)
    assert f"CSVLogger has already started to write to {tmp_path / 'own'}" in caplog.text
    assert logger.save_dir == str(tmp_path / "own")
    close_log(trainer)


def test_its_directory_is_left_alone_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = CSVLogger(save_dir="mine")
    trainer = quiet_trainer(logger=False)
    nl.NeMoLogger(log_dir="exp", extra_loggers=[lambda: logger], update_logger_directory=False).setup(trainer)
    assert logger.log_dir == str(tmp_path / "mine")
    close_log(trainer)
