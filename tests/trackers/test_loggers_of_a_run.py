"""The loggers that NeMoLogger gives a trainer write to its run."""

from __future__ import annotations

import functools
from pathlib import Path

import fiddle as fdl
import pytest
from helpers.logged_run import Tiny, data, trainers, working_directory  # noqa: F401  fixtures
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from nemologger.errors import ConfigurationError
from nemologger.logger import NeMoLogger

pytestmark = pytest.mark.filterwarnings("ignore")


def test_loggers_join_the_trainers_own_each_once(make):
    csv, tb = CSVLogger("csv"), TensorBoardLogger("tb", name="x")
    trainer = make(logger=[theirs := CSVLogger("theirs"), csv])
    run = NeMoLogger(version="v1", tensorboard=tb, extra_loggers=[csv, tb]).setup(trainer)
    assert trainer.loggers == [theirs, csv, tb]
    assert Path(tb.log_dir) == run.exp_dir / "tb/x/v1"


def test_the_default_logger_is_kept_unless_tensorboard_is_given(make):
    trainer = make()
    default = trainer.logger
    run = NeMoLogger(version="v1", extra_loggers=[csv := CSVLogger("csv")]).setup(trainer)
    assert trainer.loggers == [default, csv]
    assert Path(default.log_dir) == run.log_dir
    trainer = make()
    NeMoLogger(tensorboard=(tb := TensorBoardLogger("tb"))).setup(trainer)
    assert trainer.loggers == [tb]


def test_a_function_may_make_them(make):
    trainer = make(logger=False)
    log = NeMoLogger(
        tensorboard=functools.partial(TensorBoardLogger, "tb", name="x"),
        wandb=fdl.build(fdl.Partial(WandbLogger, save_dir="wb", offline=True)),
    )
    run = log.setup(trainer)
    assert [type(logger) for logger in trainer.loggers] == [TensorBoardLogger, WandbLogger]
    assert trainer.loggers[1].save_dir == str(run.exp_dir / "wb")
    with pytest.raises(ConfigurationError, match="one of Lightning's loggers"):
        NeMoLogger(wandb=lambda: 3).setup(make())


def test_two_in_one_directory_are_refused(make):
    """TensorBoard would hide a part of each; that the versions differ does not keep them apart in a run."""

    def pair(**apart):
        return [TensorBoardLogger("tb", name="x", version="a"), TensorBoardLogger("tb", version="b", **apart)]

    with pytest.raises(ConfigurationError, match=r"two TensorBoardLoggers would both write to .*/tb/x/v1, and"):
        NeMoLogger(version="v1").setup(make(logger=pair(name="x")))
    NeMoLogger(version="v1").setup(make(logger=pair(name="x", sub_dir="y")))
    NeMoLogger(version="v1", update_logger_directory=False).setup(make(logger=pair(name="x")))


def test_their_directories_are_left_alone_on_request(tmp_path, make):
    trainer = make(logger=False)
    tb, wb = TensorBoardLogger("tb", name="x", version="own"), WandbLogger(save_dir="wb", offline=True)
    run = NeMoLogger(update_logger_directory=False, tensorboard=tb, wandb=wb).setup(trainer)
    assert (tb.log_dir, wb.save_dir) == ("tb/x/own", "wb")
    assert wb.version == (run.log_dir / "wandb_id.txt").read_text().strip()


def test_a_logger_that_has_started_stays_where_it_is_and_is_named(make, caplog):
    tb = TensorBoardLogger("tb", name="x")
    tb.log_metrics({"a": 1.0}, 0)
    NeMoLogger(tensorboard=tb).setup(make())
    assert tb.save_dir == "tb"
    assert "TensorBoardLogger has already started to write to tb" in caplog.text
    tb.finalize("success")


def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch, make):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    try:
        for _ in range(2):
            trainer = make(logger=False)
            log = NeMoLogger(name="n", wandb=WandbLogger(save_dir="wb", name="mine"))
            run = log.setup(trainer, resume_if_exists=True)
            trainer.fit(Tiny(), data())
            ids.append(trainer.logger.experiment.id)
            wandb.finish()
    finally:
        wandb.teardown()
    assert ids[0] == ids[1] == (run.log_dir / "wandb_id.txt").read_text().strip()
    written = [*(run.exp_dir / "wb" / "wandb").glob(f"offline-run-*-{ids[0]}")]
    assert written
    assert not (tmp_path / "wandb").exists()
