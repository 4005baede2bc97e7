from __future__ import annotations

import logging
import os
import re
import sys
import types
from pathlib import Path

import pytest
from helpers.sections import NO_CKPT, OFF, bare_trainer, ckpt, fit, one_of
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf

from nemologger import ModelCheckpoint, run_of
from nemologger.errors import (
    CheckpointMisconfigurationError,
    ConfigurationError,
    LoggerMisconfigurationError,
    NotFoundError,
)
from nemologger.exp_manager import exp_manager
from nemologger.lightning_port import callbacks
from nemologger.run.record import close_log


def set_up(section, trainer=None):
    """The run directory of ``section``; nothing is trained."""
    trainer = trainer or bare_trainer()
    run = exp_manager(trainer, section)
    close_log(trainer)
    return run


def test_by_default_it_is_dated_below_the_working_directory():
    run = set_up(NO_CKPT)
    assert run.parent == Path.cwd() / "nemo_experiments" / "default"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)
    assert (run / "cmd-args.log").is_file()
    assert (run / "nemo_log_globalrank-0_localrank-0.txt").is_file()


def test_exp_dir_name_and_version(tmp_path):
    assert set_up({**NO_CKPT, "exp_dir": tmp_path, "name": "n", "version": 957}) == tmp_path / "n" / "957"


def test_the_version_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_EXPM_VERSION", "env")
    assert set_up({**NO_CKPT, "exp_dir": tmp_path}) == tmp_path / "default" / "env"
    assert set_up({**NO_CKPT, "exp_dir": tmp_path, "use_datetime_version": False}) == tmp_path / "default" / "env"
    assert set_up({**NO_CKPT, "exp_dir": tmp_path, "version": "own"}) == tmp_path / "default" / "own"


def test_without_dates_versions_are_counted(tmp_path):
    section = {**NO_CKPT, "exp_dir": tmp_path, "use_datetime_version": False}
    assert set_up(section).name == "version_0"
    assert set_up(section).name == "version_1"
    (tmp_path / "default" / "version_9").mkdir()
    (tmp_path / "default" / "version_x").mkdir()
    assert set_up(section).name == "version_10"
    assert set_up({**section, "name": "other"}) == tmp_path / "other" / "version_0"


def test_a_run_that_may_resume_has_no_version(tmp_path):
    section = {**NO_CKPT, "exp_dir": tmp_path, "resume_if_exists": True, "resume_ignore_no_checkpoint": True}
    assert set_up(section) == tmp_path / "default"
    assert set_up({**section, "use_datetime_version": False}) == tmp_path / "default"
    assert set_up({**section, "version": "v"}) == tmp_path / "default" / "v"


def test_explicit_log_dir_is_the_run_directory(tmp_path, caplog):
    assert set_up({**NO_CKPT, "explicit_log_dir": tmp_path / "here"}) == tmp_path / "here"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    section = {**NO_CKPT, "explicit_log_dir": tmp_path / "here", "exp_dir": "/elsewhere", "version": "v"}
    assert set_up(section) == tmp_path / "here"
    for key in ("exp_dir", "version"):
        assert f"exp_manager.{key} has no effect: explicit_log_dir" in caplog.text
    # The files of the first life are put aside.
    assert (tmp_path / "here" / "run_0" / "cmd-args.log").is_file()


def test_the_name_of_an_explicit_run_is_in_its_checkpoints(tmp_path):
    trainer = bare_trainer(max_steps=5)
    run = exp_manager(trainer, {**ckpt(every_n_train_steps=5), "explicit_log_dir": tmp_path, "name": "quartz"})
    fit(trainer)
    assert [path.name for path in (run / "checkpoints").glob("quartz--val_loss=*-epoch=0-step=5")]


def test_a_name_with_a_slash_says_where_the_run_is(tmp_path):
    section = {"exp_dir": tmp_path, "name": "asr/quartz", "resume_if_exists": True, "resume_ignore_no_checkpoint": True}
    params = {"every_n_train_steps": 5, "save_nemo_on_train_end": True, "postfix": ".pt"}
    for steps in (5, 10):
        trainer = bare_trainer(max_steps=steps)
        run = exp_manager(trainer, {**ckpt(**params), "create_tensorboard_logger": True, **section})
        fit(trainer)
    assert run == tmp_path / "asr" / "quartz"
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "checkpoints" / "quartz.pt").is_file()
    assert {path.name.partition("--")[0] for path in (run / "checkpoints").iterdir() if path.is_dir()} == {"quartz"}


def test_what_has_no_other_place_goes_to_the_run_directory(tmp_path):
    trainer = bare_trainer()
    run = set_up({**NO_CKPT, "exp_dir": tmp_path}, trainer)
    assert trainer.default_root_dir == trainer.log_dir == str(run)


def test_files_are_copied(tmp_path):
    (tmp_path / "conf.yaml").write_text("a: 1\n")
    run = set_up({**NO_CKPT, "exp_dir": tmp_path, "files_to_copy": [str(tmp_path / "conf.yaml")]})
    assert (run / "conf.yaml").read_text() == "a: 1\n"
    with pytest.raises(NotFoundError, match=r"files_to_copy.*gone\.yaml"):
        set_up({**NO_CKPT, "exp_dir": tmp_path, "files_to_copy": ["gone.yaml"]})


@pytest.mark.parametrize(
    ("key", "ranks"),
    [
        (None, {(0, 0), (1, 1), (2, 0), (3, 1)}),
        ("log_local_rank_0_only", {(0, 0), (2, 0)}),
        ("log_global_rank_0_only", {(0, 0)}),
    ],
)
def test_which_ranks_write_a_log_file(tmp_path, key, ranks):
    """The log files are attached as each of four ranks on two nodes would; what is translated is the setting."""
    trainer = bare_trainer()
    run = exp_manager(trainer, {**NO_CKPT, "exp_dir": tmp_path, **({key: True} if key else {})})
    log_files = one_of(trainer, "RunRecord")._log_files
    for rank, local in sorted(ranks | {(0, 0), (1, 1), (2, 0), (3, 1)}):
        log_files.attach(rank, local)
        logging.getLogger("mine").error("here")
        log_files.release()
    written = {path.name for path in run.glob("nemo_log_*")}
    assert written == {f"nemo_log_globalrank-{rank}_localrank-{local}.txt" for rank, local in ranks}


def test_both_at_once_contradict_each_other(tmp_path):
    section = {**NO_CKPT, "exp_dir": tmp_path, "log_local_rank_0_only": True, "log_global_rank_0_only": True}
    with pytest.raises(ConfigurationError, match="choose one"):
        set_up(section)


def test_seconds_to_sleep_is_not_slept(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it slept"))
    section = {**NO_CKPT, "exp_dir": tmp_path, "version": "v", "seconds_to_sleep": 1000}
    run = set_up(section)
    text = (run / "nemo_log_globalrank-0_localrank-0.txt").read_text()
    assert "exp_manager.seconds_to_sleep is not needed" in text


# --- when it does nothing, or cannot ----------------------------------------------------------------------------------


def test_without_a_section_it_does_nothing(caplog):
    trainer = bare_trainer()
    assert exp_manager(trainer, None) is None
    assert exp_manager(trainer) is None
    assert "no cfg" in caplog.text
    assert run_of(trainer) is None
    assert not (Path.cwd() / "nemo_experiments").exists()


def test_a_fast_dev_run_does_nothing(tmp_path):
    trainer = bare_trainer(fast_dev_run=True)
    before = list(callbacks(trainer))
    assert exp_manager(trainer, {"exp_dir": tmp_path / "x"}) is None
    assert callbacks(trainer) == before
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "switch", ["tensorboard_logger", "wandb_logger", "mlflow_logger", "dllogger_logger", "clearml_logger"]
)
def test_a_trainer_with_a_logger_gets_none(tmp_path, switch):
    trainer = bare_trainer(logger=CSVLogger(tmp_path))
    before = list(callbacks(trainer))
    with pytest.raises(LoggerMisconfigurationError, match=rf"CSVLogger.*create_{switch}=True.*logger=False"):
        exp_manager(trainer, {**NO_CKPT, f"create_{switch}": True})
    assert callbacks(trainer) == before


@pytest.mark.parametrize("key", ["explicit_log_dir", "exp_dir", "name"])
def test_a_trainer_with_a_logger_has_a_directory(tmp_path, key):
    trainer = bare_trainer(logger=CSVLogger(tmp_path))
    with pytest.raises(LoggerMisconfigurationError, match=key):
        exp_manager(trainer, {**NO_CKPT, key: "x"})


@pytest.mark.parametrize(("version", "directory"), [(None, "version_0"), (7, "version_7"), ("seven", "seven")])
def test_the_trainers_logger_says_where_the_run_is(tmp_path, version, directory, caplog):
    trainer = bare_trainer(logger=TensorBoardLogger(tmp_path, name="tb", version=version), max_steps=2)
    run = exp_manager(trainer, {**NO_CKPT, "version": "other"})
    fit(trainer)
    assert run == tmp_path / "tb" / directory
    assert list(run.glob("events.out.tfevents.*"))
    assert "exp_manager.version has no effect" in caplog.text


def test_a_trainer_with_a_checkpoint_callback_gets_none(tmp_path):
    trainer = bare_trainer(enable_checkpointing=True)
    with pytest.raises(CheckpointMisconfigurationError, match=r"ModelCheckpoint.*enable_checkpointing=False"):
        exp_manager(trainer, {**OFF, "exp_dir": tmp_path})
    trainer = bare_trainer(callbacks=[ModelCheckpoint(filename="mine-{step}")], enable_checkpointing=True)
    exp_manager(trainer, {**NO_CKPT, "exp_dir": tmp_path, "version": "v"})
    fit(trainer)
    assert (tmp_path / "default" / "v" / "checkpoints" / "mine-step=10").is_dir()


def test_the_callers_configuration_stays_as_it_is(tmp_path):
    cfg = OmegaConf.create({**NO_CKPT, "exp_dir": str(tmp_path), "wandb_logger_kwargs": {"name": "n"}})
    before = OmegaConf.to_yaml(cfg)
    set_up(cfg)
    assert OmegaConf.to_yaml(cfg) == before


def test_a_trainer_that_could_not_be_set_up_can_be_set_up_again(tmp_path):
    trainer = bare_trainer(max_steps=5)
    before = list(callbacks(trainer))
    section = {**ckpt(every_n_train_steps=5), "exp_dir": tmp_path, "resume_if_exists": True}
    with pytest.raises(NotFoundError):
        exp_manager(trainer, section)
    assert callbacks(trainer) == before
    assert trainer.loggers == []
    exp_manager(trainer, {**section, "resume_ignore_no_checkpoint": True})
    fit(trainer)
    assert (tmp_path / "default" / "checkpoints").is_dir()


def test_hydra_must_not_have_changed_the_working_directory(tmp_path, monkeypatch):
    from hydra.core.hydra_config import HydraConfig  # a dependency of the tests of sweeps

    config = OmegaConf.create({"hydra": {"runtime": {"cwd": str(Path.cwd())}}})
    OmegaConf.set_readonly(config.hydra, True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
    assert set_up({**NO_CKPT, "exp_dir": tmp_path}).is_dir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=rf"Hydra changed the working directory.*to {re.escape(os.getcwd())}"):
        set_up({**NO_CKPT, "exp_dir": tmp_path})


def test_it_does_not_import_hydra(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra.core.hydra_config", None)
    assert isinstance(sys.modules.get("hydra.core.hydra_config"), types.NoneType)
    assert set_up(NO_CKPT).is_dir()
