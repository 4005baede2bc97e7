from __future__ import annotations

import functools
import logging
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import fiddle as fdl
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, TensorDataset

from nemologger.errors import ConfigurationError, NotFoundError
from nemologger.logger import NeMoLogger
from nemologger.run_record import RunRecord, close_log, run_of

pytestmark = pytest.mark.filterwarnings("ignore")

DATED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?")
MINE = "nemo_log_globalrank-0_localrank-0.txt"


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).mean()
        self.log("loss", loss)
        logging.getLogger("mine").info("batch %d", index)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", self.layer(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make():
    """Makes trainers, and releases the log files of those that never ran."""
    made: list[pl.Trainer] = []

    def trainer(**kwargs) -> pl.Trainer:
        settings = {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        made.append(pl.Trainer(**{**settings, **kwargs}))
        return made[-1]

    yield trainer
    for one in made:
        close_log(one)


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)


def ours() -> list[logging.Handler]:
    return [handler for handler in logging.getLogger().handlers if type(handler).__module__.startswith("nemologger")]


# --- directory --------------------------------------------------------------------------------------------------------


def test_the_run_directory_is_base_name_version(tmp_path, make):
    run = NeMoLogger(name="mnist", version="v1").setup(make())
    assert (run.exp_dir, run.log_dir) == (tmp_path / "nemo_experiments", tmp_path / "nemo_experiments/mnist/v1")
    assert (run.name, run.version) == ("mnist", "v1")
    assert run.log_dir.is_dir()
    with pytest.raises(AttributeError):
        run.name = "other"


def test_the_version_is_the_time_and_two_runs_of_one_second_are_two(tmp_path, make):
    log = NeMoLogger(log_dir=tmp_path / "base")
    runs = [log.setup(make()) for _ in range(3)]
    assert all(DATED.fullmatch(run.version) and run.log_dir.name == run.version for run in runs)
    assert len({run.log_dir for run in runs}) == 3
    assert "NEMO_EXPM_VERSION" not in os.environ


def test_the_environment_gives_the_version(make, monkeypatch):
    monkeypatch.setenv("NEMO_EXPM_VERSION", "from_env")
    assert NeMoLogger().setup(make(), resume_if_exists=True).version == "from_env"


def test_a_run_that_may_resume_has_no_version_and_says_so(make, caplog):
    with caplog.at_level(logging.INFO, "nemologger"):
        run = NeMoLogger().setup(make(), resume_if_exists=True)
    assert run.version is None
    assert run.log_dir == run.exp_dir / "default"
    said = [record for record in caplog.records if "without a version, so that the next start" in record.getMessage()]
    assert [record.levelname for record in said] == ["INFO"], "it is what was asked for"


def test_an_explicit_directory_is_the_run_directory_and_an_existing_one_is_told(tmp_path, make, caplog):
    log = NeMoLogger(name="ignored", explicit_log_dir="mine")
    run = log.setup(make())
    assert (run.log_dir, run.exp_dir) == (tmp_path / "mine", tmp_path / "mine")
    assert (run.name, run.version) == ("", "")
    assert "already exists" not in caplog.text
    NeMoLogger(explicit_log_dir=tmp_path / "mine").setup(make(), resume_if_exists=True)
    assert "already exists" not in caplog.text, "a run that resumes expects it"
    NeMoLogger(explicit_log_dir=tmp_path / "mine").setup(make())
    assert "already exists" in caplog.text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"explicit_log_dir": "a", "log_dir": "b"}, "log_dir='b'"),
        ({"explicit_log_dir": "a", "version": "b"}, "version='b'"),
        ({"log_local_rank_0_only": True, "log_global_rank_0_only": True}, "both True"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": ".."}, r"name='\.\.'"),
        ({"name": ""}, "name=''"),
        ({"version": "a/b"}, "version='a/b'"),
        ({"log_dir": "s3://bucket/a"}, "s3://bucket/a"),
        ({"ckpt": "best"}, "ckpt must be a ModelCheckpoint"),
        ({"extra_loggers": "csv"}, "extra_loggers must be a list"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        NeMoLogger(**settings)


def test_settings_changed_later_are_checked_too(make):
    log = NeMoLogger()
    log.name = "a/b"
    with pytest.raises(ConfigurationError, match="a/b"):
        log.setup(make())


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write to the run directory"):
        NeMoLogger(log_dir=tmp_path / "file").setup(make())
    assert ours() == []


def test_fabric_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"lightning\.pytorch\.Trainer.*Fabric"):
        NeMoLogger(log_dir=tmp_path).setup(Fabric(accelerator="cpu", devices=1))


def test_on_several_nodes_of_lightnings_own_launcher_a_time_is_no_version(make, monkeypatch):
    for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    trainer = make(num_nodes=2, devices=2, strategy="ddp")
    with pytest.raises(ConfigurationError, match=r"2 nodes.*version=.*NEMO_EXPM_VERSION"):
        NeMoLogger().setup(trainer)


# --- one record per trainer -------------------------------------------------------------------------------------------


def test_a_second_setup_changes_nothing(make):
    trainer = make()
    log = NeMoLogger(name="a", tensorboard=functools.partial(TensorBoardLogger, "tb"), ckpt=ModelCheckpoint())
    first = log.setup(trainer)
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    files = sorted(first.log_dir.rglob("*"))
    assert log.setup(trainer) is first
    assert run_of(trainer) is first
    assert (trainer.callbacks, trainer.loggers) == (callbacks, loggers)
    assert sorted(first.log_dir.rglob("*")) == files


def test_a_second_setup_with_other_settings_is_refused_and_names_them(make):
    trainer = make()
    log = NeMoLogger(name="a")
    log.setup(trainer)
    with pytest.raises(ConfigurationError, match="name was 'a', now 'b'"):
        NeMoLogger(name="b").setup(trainer)
    with pytest.raises(ConfigurationError, match="resume_if_exists was False, now True"):
        log.setup(trainer, resume_if_exists=True)
    log.extra_loggers.append(CSVLogger("csv"))
    with pytest.raises(ConfigurationError, match="extra_loggers"):
        log.setup(trainer)


def test_two_trainers_do_not_see_each_other(make):
    one, two = make(), make()
    runs = [NeMoLogger(name=name, ckpt=ModelCheckpoint()).setup(t) for name, t in (("a", one), ("b", two))]
    assert [run_of(one), run_of(two), run_of(make())] == [*runs, None]
    for trainer in (one, two):
        trainer.fit(Tiny(), data())
    for run in runs:
        assert "batch 1" in (run.log_dir / MINE).read_text()
        assert len([*run.checkpoint_dir.iterdir()]) == 1


def test_one_logger_serves_trainer_after_trainer_but_a_used_checkpoint_callback_does_not(make):
    log = NeMoLogger(ckpt=ModelCheckpoint())
    first, second = log.setup(make()), log.setup(trainer := make())
    assert log.ckpt.dirpath == str(second.checkpoint_dir) != str(first.checkpoint_dir)
    trainer.fit(Tiny(), data())
    with pytest.raises(ConfigurationError, match="ModelCheckpoint of its own"):
        log.setup(make())


def test_one_logger_serves_the_next_trainer_of_the_same_run(make):
    log = NeMoLogger(ckpt=ModelCheckpoint())
    for steps in (2, 4):
        trainer = make(max_steps=steps)
        run = log.setup(trainer, resume_if_exists=True)
        trainer.fit(Tiny(), data(), ckpt_path=log.ckpt.best_model_path or None)
    assert Path(log.ckpt.best_model_path) == run.checkpoint_dir / "default--epoch=0-step=4.ckpt"


# --- checkpoint callback ----------------------------------------------------------------------------------------------


class Mine(ModelCheckpoint):
    pass


def test_the_callback_replaces_the_trainers_with_a_warning(make, caplog):
    trainer = make(callbacks=[theirs := Mine(monitor="loss")])
    NeMoLogger(ckpt=(ckpt := ModelCheckpoint())).setup(trainer)
    assert theirs not in trainer.callbacks
    assert trainer.checkpoint_callbacks == [ckpt]
    assert "Mine(monitor='loss') is replaced" in caplog.text


def test_the_one_that_lightning_adds_by_itself_is_replaced_in_silence(make, caplog):
    trainer = make()
    NeMoLogger(ckpt=(ckpt := ModelCheckpoint())).setup(trainer)
    assert trainer.checkpoint_callbacks == [ckpt]
    assert "replaced" not in caplog.text


def test_it_is_added_where_there_is_none_and_none_is_added_without_it(make):
    trainer = make(enable_checkpointing=False)
    NeMoLogger(ckpt=(ckpt := ModelCheckpoint())).setup(trainer)
    assert trainer.checkpoint_callbacks == [ckpt]
    trainer = make(enable_checkpointing=False)
    NeMoLogger().setup(trainer)
    assert trainer.checkpoint_callbacks == []


def test_several_of_the_trainers_get_the_run_directory(make):
    callbacks = [ModelCheckpoint(monitor="loss"), ModelCheckpoint(monitor="val/loss", dirpath="mine", filename="x")]
    trainer = make(callbacks=callbacks)
    run = NeMoLogger(name="n").setup(trainer)
    assert trainer.checkpoint_callbacks == callbacks
    assert callbacks[0].dirpath == str(run.checkpoint_dir)
    assert callbacks[0].filename == "n--{loss:.4f}-{epoch}-{step}"
    assert (Path(callbacks[1].dirpath).name, callbacks[1].filename) == ("mine", "x")


def test_checkpoints_come_after_all_that_training_does(make):
    class Late(Callback):
        pass

    trainer = make(callbacks=[ModelCheckpoint(), Late()])
    NeMoLogger().setup(trainer)
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    assert kinds[-2:] == ["ModelCheckpoint", "EndOfLog"]
    assert kinds.index("RunRecord") < kinds.index("ModelCheckpoint")


@pytest.mark.parametrize(
    ("monitor", "settings", "saved"),
    [
        ("val/loss", {"name": "n"}, r"n--val_loss=-?\d\.\d{4}-epoch=0-step=2\.ckpt"),
        ("loss", {"name": "n"}, r"n--loss=-?\d\.\d{4}-epoch=0-step=2\.ckpt"),
        (None, {"name": "n"}, r"n--epoch=0-step=2\.ckpt"),
        ("loss", {"explicit_log_dir": "mine"}, r"loss=-?\d\.\d{4}-epoch=0-step=2\.ckpt"),
    ],
)
def test_a_checkpoint_is_one_file_named_after_the_run(make, monitor, settings, saved):
    trainer = make(limit_train_batches=2, limit_val_batches=1)
    run = NeMoLogger(ckpt=ModelCheckpoint(monitor=monitor, every_n_epochs=1), **settings).setup(trainer)
    trainer.fit(Tiny(), data(), data())
    (path,) = run.checkpoint_dir.rglob("*")
    assert re.fullmatch(saved, path.name)


@pytest.mark.parametrize("given", [True, False])
def test_a_monitor_that_cannot_appear_is_an_error_before_anything_is_written(tmp_path, make, given):
    ckpt = ModelCheckpoint(monitor="val_loss")
    trainer = make(max_epochs=2, check_val_every_n_epoch=3, callbacks=[] if given else [ckpt])
    with pytest.raises(ConfigurationError, match=r"'val_loss'.*check_val_every_n_epoch=3.*max_epochs=2"):
        NeMoLogger(ckpt=ckpt if given else None).setup(trainer)
    assert not [*tmp_path.iterdir()]
    assert run_of(trainer) is None


def test_a_monitor_of_training_a_time_limit_and_a_trial_run_are_no_error(make):
    NeMoLogger(ckpt=ModelCheckpoint(monitor="loss")).setup(make(max_epochs=2, check_val_every_n_epoch=3))
    timed = make(max_steps=-1, max_time="00:01:00:00", check_val_every_n_epoch=2000)
    NeMoLogger(ckpt=ModelCheckpoint(monitor="val_loss")).setup(timed)
    trial = make(fast_dev_run=True, limit_val_batches=0)
    NeMoLogger(ckpt=ModelCheckpoint(monitor="val_loss"), tensorboard=TensorBoardLogger("tb")).setup(trial)
    trial.fit(Tiny(), data())
    assert not Path("nemo_experiments/tb").exists()


# --- trackers ---------------------------------------------------------------------------------------------------------


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


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_in_its_directory(tmp_path, make):
    (tmp_path / "config.yaml").write_text("lr: 1")
    trainer = make(logger=False)
    run = NeMoLogger(files_to_copy=["config.yaml"]).setup(trainer, task_config=fdl.Config(Tiny))
    trainer.fit(Tiny(), data())
    expected = {"cmd-args.log", "config.yaml", "lightning_logs.txt", "nemo_error_log.txt", "task.json", MINE}
    assert {path.name for path in run.log_dir.iterdir()} - {"git-info.log"} == expected | {"checkpoints"}
    assert (run.log_dir / "config.yaml").read_text() == "lr: 1"
    assert "mine: batch 1" in (run.log_dir / MINE).read_text()
    assert "`max_steps=2` reached" in (run.log_dir / "lightning_logs.txt").read_text()


def test_a_missing_file_to_copy_is_an_error_before_anything_is_made(tmp_path, make):
    with pytest.raises(NotFoundError, match=r"gone\.yaml"):
        NeMoLogger(files_to_copy=["gone.yaml"]).setup(make())
    assert not [*tmp_path.iterdir()]
    assert ours() == []


def test_on_a_resume_the_earlier_lifes_log_files_move_and_the_rest_stays(make):
    for life in range(3):
        trainer = make(max_steps=2)
        tb = TensorBoardLogger(".", name="default")
        run = NeMoLogger(tensorboard=tb, files_to_copy=[__file__]).setup(trainer, resume_if_exists=True)
        logging.getLogger("mine").info("this is life %d", life)
        trainer.fit(Tiny(), data())
    for life in range(2):
        names = {path.name for path in (run.log_dir / f"run_{life}").iterdir()}
        assert {"cmd-args.log", "lightning_logs.txt", "nemo_error_log.txt", MINE, Path(__file__).name} <= names
        assert f"this is life {life}" in (run.log_dir / f"run_{life}" / MINE).read_text()
    assert "this is life 2" in (run.log_dir / MINE).read_text()
    assert not (run.log_dir / "run_2").exists()
    assert len([*run.log_dir.glob("events.out.tfevents.*")]) == 3
    assert (run.log_dir / "checkpoints").is_dir()


def test_after_training_no_handler_and_no_open_file_is_left(make):
    level = logging.getLogger().level
    trainer = make()
    run = NeMoLogger().setup(trainer)
    assert len(ours()) == 1
    trainer.fit(Tiny(), data())
    assert ours() == []
    assert logging.getLogger().level == level
    trainer.validate(Tiny(), data(), verbose=False)
    assert ours() == []
    fds = Path("/proc/self/fd")
    assert not fds.is_dir() or not [
        f for f in fds.iterdir() if f.resolve().suffix == ".txt" and run.name in str(f.resolve())
    ]


def test_an_exception_is_in_the_error_log_with_the_last_words_of_the_checkpoint_callback(make):
    class Talks(ModelCheckpoint):
        def on_exception(self, trainer, module, exception):
            logging.getLogger("mine").error("saved in time")

    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("boom")

    trainer = make(callbacks=[Fails()])
    run = NeMoLogger(ckpt=Talks()).setup(trainer)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(Tiny(), data())
    errors = (run.log_dir / "nemo_error_log.txt").read_text()
    assert "stopped at step 1 by RuntimeError: boom" in errors
    assert 'raise RuntimeError("boom")' in errors
    assert errors.index("boom") < errors.index("saved in time")
    assert ours() == []


def test_another_runs_files_are_released_when_a_run_starts(make):
    one, two = make(), make()
    first = NeMoLogger(name="a").setup(one)
    second = NeMoLogger(name="b").setup(two)
    logging.getLogger("mine").info("between")
    assert "between" in (second.log_dir / MINE).read_text()
    assert "between" not in (first.log_dir / MINE).read_text()
    assert len(ours()) == 1


def test_the_record_can_travel_to_another_process(make):
    import pickle

    trainer = make()
    run = NeMoLogger(tensorboard=functools.partial(TensorBoardLogger, "tb")).setup(trainer, task_config=lambda: 0)
    record = next(callback for callback in trainer.callbacks if isinstance(callback, RunRecord))
    assert pickle.loads(pickle.dumps(record)).run == run


def test_lightning_checkpoints_do_not_mention_us(make):
    trainer = make()
    run = NeMoLogger(ckpt=ModelCheckpoint()).setup(trainer)
    trainer.fit(Tiny(), data())
    (path,) = run.checkpoint_dir.iterdir()
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    assert not [key for key in callbacks if not key.startswith("ModelCheckpoint")]


# --- several processes ------------------------------------------------------------------------------------------------

SCRIPT = """
    import json, logging, sys
    from pathlib import Path
    import lightning.pytorch as pl, torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset
    from nemologger.errors import NemologgerError
    from nemologger.logger import NeMoLogger
    from nemologger.run_record import run_of

    torch.set_num_threads(1)

    class Tiny(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
        def training_step(self, batch, index):
            logging.getLogger("mine").info("rank %d trains", self.global_rank)
            return self.layer(batch[0]).mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    def say(line):
        sys.stdout.write(line + chr(10))  # at once: the other rank writes to the same pipe
        sys.stdout.flush()

    base, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    runs = []
    for name in ("a", "b"):
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=settings.pop("strategy", "ddp"), max_steps=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )
        try:
            run = NeMoLogger(name=name, log_dir=base, ckpt=ModelCheckpoint(), **settings).setup(trainer)
        except NemologgerError as error:
            say(f"REFUSED {trainer.global_rank} {type(error).__name__}")
            sys.exit(3)
        trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
        assert run_of(trainer) is run
        say(f"RUN {trainer.global_rank} {name} {run.log_dir}")
        if "once" in sys.argv:
            break
"""


def launch(directory: Path, *, torchrun: bool, settings: str = "{}", extra: tuple[str, ...] = ()) -> tuple[int, str]:
    script = directory / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)] if torchrun else []
    unset = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT", "MASTER_ADDR")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *start, str(script), str(directory / "base"), settings, *extra],
        env=environment,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.dist
@pytest.mark.parametrize("torchrun", [True, False])
def test_all_ranks_get_one_directory_for_each_of_two_runs(tmp_path, torchrun):
    code, output = launch(tmp_path, torchrun=torchrun)
    assert code == 0, output
    found = re.findall(r"RUN (\d) (\w) (\S+)", output)
    assert sorted((rank, name) for rank, name, _ in found) == [("0", "a"), ("0", "b"), ("1", "a"), ("1", "b")]
    for name in "ab":
        (directory,) = {Path(path) for _, of, path in found if of == name}
        assert DATED.fullmatch(directory.name)
        assert [path.name for path in directory.parent.iterdir()] == [directory.name]
        for rank in (0, 1):
            text = (directory / f"nemo_log_globalrank-{rank}_localrank-{rank}.txt").read_text()
            assert f"rank {rank} trains" in text
            assert f"rank {1 - rank} trains" not in text
        assert len([*(directory / "checkpoints").iterdir()]) == 1


@pytest.mark.dist
def test_processes_that_lightning_forks_have_files_of_their_own(tmp_path):
    code, output = launch(tmp_path, torchrun=False, settings='{"strategy": "ddp_fork"}', extra=("once",))
    assert code == 0, output
    (directory,) = (tmp_path / "base" / "a").iterdir()
    for rank in (0, 1):
        text = (directory / f"nemo_log_globalrank-{rank}_localrank-{rank}.txt").read_text()
        assert text.count("trains") == text.count(f"rank {rank} trains") == 1


@pytest.mark.dist
def test_what_stops_rank_0_stops_every_rank(tmp_path):
    code, output = launch(tmp_path, torchrun=True, settings='{"files_to_copy": ["gone.yaml"]}')
    assert code != 0
    assert "REFUSED 0 NotFoundError" in output
    assert "REFUSED 1 NotFoundError" in output
    assert not (tmp_path / "base").exists()
