"""A NeMoLogger makes the directory of a run, its record and its files."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import fiddle as fdl
import pytest
import torch
from helpers.logged_run import Tiny, data, ours, trainers, working_directory  # noqa: F401  fixtures
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from nemologger.errors import ConfigurationError, DirectoryInUseError, NotFoundError
from nemologger.logger import NeMoLogger
from nemologger.run.record import RunRecord, close_log, run_of

pytestmark = pytest.mark.filterwarnings("ignore")

DATED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?")
MINE = "nemo_log_globalrank-0_localrank-0.txt"


# --- directory --------------------------------------------------------------------------------------------------------


def test_the_run_directory_is_base_name_version(tmp_path, make):
    run = NeMoLogger(name="mnist", version="v1").setup(make())
    assert (run.exp_dir, run.log_dir) == (tmp_path / "nemo_experiments", tmp_path / "nemo_experiments/mnist/v1")
    assert (run.name, run.version) == ("mnist", "v1")
    assert run.log_dir.is_dir()
    with pytest.raises(AttributeError):
        run.name = "other"


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_start_that_is_refused_for_a_live_run_leaves_the_run_directory_as_it_was(tmp_path, make):
    """Wherever that run keeps its checkpoints: what is in the way may be a callback of the trainer."""
    kept = tmp_path / "kept"
    kept.mkdir()
    lock = (
        "import sys, time; from pathlib import Path; from nemologger.disk.lock import DirectoryLock\n"
        "DirectoryLock(Path(sys.argv[1])).take(); print(flush=True); time.sleep(60)"
    )
    run = NeMoLogger(version="v1").setup(earlier := make())
    close_log(earlier)
    with subprocess.Popen([sys.executable, "-c", lock, str(kept)], stdout=subprocess.PIPE) as live:
        live.stdout.readline()
        before = _files(run.log_dir)
        with pytest.raises(DirectoryInUseError, match="another run is writing to"):
            NeMoLogger(version="v1").setup(make(callbacks=[ModelCheckpoint(dirpath=kept)]))
        live.kill()
    assert _files(run.log_dir) == before


def test_a_start_that_is_refused_for_its_loggers_leaves_the_run_directory_as_it_was(make):
    def pair():
        return [TensorBoardLogger("tb", name="x"), TensorBoardLogger("tb", name="x")]

    run = NeMoLogger(version="v1").setup(earlier := make())
    close_log(earlier)
    before = _files(run.log_dir)
    with pytest.raises(ConfigurationError, match="two TensorBoardLoggers would both write to"):
        NeMoLogger(version="v1").setup(make(logger=pair()))
    assert _files(run.log_dir) == before


def test_checkpoints_that_are_only_read_may_be_where_nothing_can_be_written(tmp_path, make, monkeypatch):
    """Whoever validates takes no lock there; whoever trains is told by ModelCheckpoint."""
    opened = os.open

    def read_only(path, *args, **options):
        if Path(path).parent == tmp_path / "kept":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, *args, **options)

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(os, "open", read_only)
    run = NeMoLogger(name="mnist", ckpt=ModelCheckpoint(dirpath=tmp_path / "kept")).setup(make())
    assert (run.log_dir / "cmd-args.log").is_file()


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
    for used in (log, NeMoLogger(name="other", ckpt=log.ckpt)):  # as a notebook's next cell makes one
        with pytest.raises(ConfigurationError, match="ModelCheckpoint of its own"):
            used.setup(make())


def test_one_logger_serves_the_next_trainer_of_the_same_run(make):
    log = NeMoLogger(ckpt=ModelCheckpoint())
    for steps in (2, 4):
        trainer = make(max_steps=steps)
        run = log.setup(trainer, resume_if_exists=True)
        trainer.fit(Tiny(), data(), ckpt_path=log.ckpt.best_model_path or None)
    assert Path(log.ckpt.best_model_path) == run.checkpoint_dir / "default--epoch=0-step=4.ckpt"


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
