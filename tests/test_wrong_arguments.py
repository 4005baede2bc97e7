"""A wrong argument is refused where it is given: the message names it, what was found and what is expected."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.fabric
import pytest
import pytorch_lightning.demos.boring_classes
from toy import loader, quiet_trainer

import nemologger as nl
from nemologger import callbacks, strategies, trackers
from nemologger.disk import LocalDisk
from nemologger.errors import ConfigurationError
from nemologger.exp_manager import exp_manager

WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (callbacks.EMA, {"decay": "0.9"}, "decay='0.9'"),
    (callbacks.EMA, {"decay": None}, "decay=None"),
    (callbacks.EMA, {"every_n_steps": 1.5}, "every_n_steps=1.5"),
    (callbacks.EMA, {"every_n_steps": "2"}, "every_n_steps='2'"),
    (callbacks.TimingCallback, {"timer_kwargs": {"buffer_size": "3"}}, "buffer_size='3': expected a number of steps"),
    (callbacks.PreemptionCallback, {"exit_code": "a"}, "exit_code='a'): expected 0 to 255"),
    (
        callbacks.PreemptionCallback,
        {"sig": "SIGTERM"},
        "sig='SIGTERM'): there is no such signal; expected signal.SIGTERM",
    ),
    (
        callbacks.PreemptionCallback,
        {"rank_timeout": 5},
        "PreemptionCallback(rank_timeout=5): expected a datetime.timedelta",
    ),
    (
        callbacks.MaxTimePerRun,
        {"duration": {"hours": 1}, "rank_timeout": timedelta(0)},
        "MaxTimePerRun(rank_timeout=datetime.timedelta(0)): expected a datetime.timedelta, more than no time",
    ),
    (callbacks.MaxTimePerRun, {"duration": {"hrs": 1}}, 'expected "DD:HH:MM:SS"'),
    (callbacks.MaxTimePerRun, {"duration": {"hours": "1"}}, 'expected "DD:HH:MM:SS"'),
    (callbacks.StragglerDetection, {"report_time_interval": "300"}, "report_time_interval='300': expected seconds"),
    (callbacks.StragglerDetection, {"gpu_relative_perf_threshold": "a"}, "gpu_relative_perf_threshold='a'"),
    (
        callbacks.StragglerDetection,
        {"num_gpu_perf_scores_to_log": 1.5},
        "num_gpu_perf_scores_to_log=1.5: expected a whole",
    ),
    (callbacks.FaultTolerance, {"rank_heartbeat_timeout": "x"}, "rank_heartbeat_timeout='x': expected seconds"),
    (callbacks.FaultTolerance, {"workload_check_interval": "x"}, "workload_check_interval='x': expected seconds"),
    (callbacks.FaultTolerance, {"safety_factor": "x"}, "safety_factor='x': expected a number from 1 on"),
    (callbacks.FLOPsMeasurement, {"log_every_n_steps": "x"}, "log_every_n_steps='x'): it must be a whole number"),
    (callbacks.FLOPsMeasurement, {"flops_per_batch": "x"}, "flops_per_batch='x'): it must be a number"),
    (callbacks.NsysCallback, {"start_step": "a", "end_step": 3}, "NsysCallback(start_step='a'"),
    (callbacks.NsysCallback, {"start_step": 1, "end_step": 3, "ranks": 3}, "NsysCallback(ranks=3): expected a list"),
    (callbacks.MemoryProfileCallback, {"ranks": "all"}, "MemoryProfileCallback(ranks='all'): expected a list of ranks"),
    (callbacks.MemoryProfileCallback, {"dir": 3}, "MemoryProfileCallback(dir=3): expected a path"),
    (callbacks.ExportModel, {"prefix": None}, "prefix=None"),
    (trackers.CSVLogger, {"save_dir": 3}, "CSVLogger(save_dir=3): expected a path"),
    (trackers.DLLogger, {"json_file": 3}, "DLLogger(json_file=3): expected a path"),
    (trackers.CSVLogger, {"flush_logs_every_n_steps": 0}, "flush_logs_every_n_steps=0): expected a whole number"),
    (strategies.FSDP2Strategy, {"data_parallel_size": 1.5}, "data_parallel_size=1.5): expected a number of ranks"),
    (strategies.FSDP2Strategy, {"tensor_parallel_size": "x"}, "tensor_parallel_size='x'): expected a number of ranks"),
    (strategies.FSDP2Strategy, {"tp_shard_plan": ["up"]}, "tp_shard_plan=['up']): expected how to split"),
    (nl.ModelCheckpoint, {"every_n_train_steps": "5"}, "every_n_train_steps='5': a whole number"),
    (nl.ModelCheckpoint, {"every_n_epochs": 2.5}, "every_n_epochs=2.5: a whole number"),
    (nl.ModelCheckpoint, {"async_save": "no"}, "ModelCheckpoint: async_save='no': expected True or False"),
    (nl.ModelCheckpoint, {"rank_timeout": 10}, "rank_timeout=10: a datetime.timedelta"),
    (nl.ModelCheckpoint, {"filename": 3}, "filename=3: a text, for example '{val_loss:.2f}-{step}'"),
    (nl.ModelCheckpoint, {"filename": "{step"}, "filename='{step': a brace without the other one"),
    (nl.ModelCheckpoint, {"filename": "{val_loss:.2q}"}, "{val_loss:.2q} cannot be filled with 0.0"),
    (nl.ModelCheckpoint, {"monitor": 3}, "monitor=3: a text, for example 'val_loss'"),
    (nl.ModelCheckpoint, {"mode": "lowest"}, "mode='lowest': 'min' or 'max'"),
    (nl.ModelCheckpoint, {"files_per_rank": "2"}, "files_per_rank='2': a whole number, at least 1"),
    (nl.ModelCheckpoint, {"max_failed_saves": None}, "max_failed_saves=None: a whole number, at least 1"),
    (nl.ModelCheckpoint, {"save_on_train_epoch_end": "yes"}, "save_on_train_epoch_end='yes': expected True or False"),
    (nl.ModelCheckpoint, {"dirpath": 3}, "dirpath is a int: expected a path, or a URL"),
    (
        nl.ModelCheckpoint,
        {"dirpath": "memory://runs", "storage_options": "key"},
        "storage_options is a str: expected a dictionary",
    ),
    (nl.ModelCheckpoint, {"dirpath": "s3:/bucket/runs"}, "'s3:/bucket/runs': a URL has two slashes"),
    (nl.ModelCheckpoint, {"dirpath": ""}, "dirpath is empty: expected a path, or a URL"),
    (nl.ModelCheckpoint, {"storage_options": "key"}, "storage_options is a str: expected a dictionary"),
    (nl.ModelCheckpoint, {"rank_timeout": timedelta(seconds=-1)}, "rank_timeout=datetime.timedelta(days=-1"),
    (nl.ModelCheckpoint, {"disk": 3}, "disk is a int: expected what nemologger.disk.LocalDisk() is"),
    (nl.ModelCheckpoint, {"disk": LocalDisk}, "disk is the class LocalDisk itself"),
    (nl.load_model, {"checkpoint": None}, "checkpoint is a NoneType: expected a path, or a URL"),
    (nl.export_weights, {"checkpoint": "x", "output": None}, "output is a NoneType: expected a path, or a URL"),
    (nl.verify_checkpoint, {"path": 5}, "path is a int: expected a path, or a URL"),
    (nl.RestoreConfig, {"path": "x", "load_optim_state": "false"}, "RestoreConfig: load_optim_state='false': expected"),
    (nl.AutoResume, {"resume_from_path": 3}, "AutoResume(resume_from_path=3): expected a path, or a URL"),
    (nl.AutoResume, {"resume_from_directory": ""}, "AutoResume(resume_from_directory=''): expected a path, or a URL"),
    (nl.AutoResume, {"storage_options": "key"}, "storage_options is a str: expected a dictionary"),
    (nl.NeMoLogger, {"version": 0}, "version must be a string, found 0"),
    (nl.NeMoLogger, {"log_dir": 3}, "log_dir is a int: expected a path"),
    (nl.AutoResume, {"resume_if_exists": "false"}, "AutoResume: resume_if_exists='false': expected True or False"),
    (nl.NeMoLogger, {"use_datetime_version": "no"}, "NeMoLogger: use_datetime_version='no': expected True or False"),
    (nl.hydra_runner, {"config_path": 5}, "hydra_runner(config_path=5): expected text"),
]


def test_a_text_that_means_true_is_taken_for_it():
    assert nl.AutoResume(resume_if_exists="true", resume_ignore_no_checkpoint="True").resume_if_exists


class _Place:
    """A path of another library, such as py.path.local."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def test_what_can_be_used_is_taken(tmp_path):
    place = _Place(tmp_path)
    assert trackers.CSVLogger(save_dir=place).save_dir == str(tmp_path)
    assert trackers.DLLogger(json_file=place).save_dir == str(tmp_path.parent)
    assert trackers.DLLogger(json_file=False, stdout=True).save_dir is None
    assert callbacks.MemoryProfileCallback(dir=place).dir is place
    assert nl.ModelCheckpoint(max_failed_saves=math.inf).max_failed_saves == math.inf


@pytest.mark.parametrize(
    ("made", "wrong", "meant"),
    [
        (nl.AutoResume, "resume_if_exist", "resume_if_exists"),
        (nl.NeMoLogger, "log_dirs", "log_dir"),
        (nl.Trainer, "max_step", "max_steps"),
        (nl.RestoreConfig, "load_optimizer_state", "load_optim_state"),
        (strategies.FSDP2Strategy, "data_paralel_size", "data_parallel_size"),
    ],
)
def test_a_misspelt_one_is_told_what_it_may_be(made, wrong, meant):
    said = rf"{made.__name__}\(\) got an unexpected keyword argument '{wrong}'; did you mean '{meant}'\?"
    with pytest.raises(TypeError, match=said):
        made(**{wrong: True})


@pytest.mark.parametrize(("made", "arguments", "said"), WRONG)
def test_it_is_named(made, arguments, said):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        made(**arguments)


def test_a_tracker_that_is_none_is_named(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"NeMoLogger\(wandb=...\): expected one of Lightning's loggers.*a bool"
    ):
        nl.NeMoLogger(log_dir=tmp_path, wandb=True).setup(quiet_trainer())


def test_a_trainer_of_the_other_package_is_named(tmp_path):
    """Libraries that import pytorch_lightning make one, and take callbacks for it."""
    ckpt = nl.ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=2, monitor=None)
    options = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_progress_bar": False}
    trainer = pytorch_lightning.Trainer(callbacks=[ckpt], **options)
    with pytest.raises(
        ConfigurationError, match=r"ModelCheckpoint: the trainer is a Trainer of the package pytorch_lightning"
    ):
        trainer.fit(pytorch_lightning.demos.boring_classes.BoringModel(), loader())
    with pytest.raises(
        ConfigurationError, match=r"AutoResume.setup: the trainer is a Trainer of the package pytorch_l"
    ):
        nl.AutoResume().setup(trainer)
    with pytest.raises(ConfigurationError, match=r"AutoResume.setup: the trainer is a Fabric, expected a lightning"):
        nl.AutoResume().setup(lightning.fabric.Fabric(accelerator="cpu"))


def test_hydra_runner_without_its_call():
    with pytest.raises(ConfigurationError, match="It is called before it decorates: @hydra_runner"):

        @nl.hydra_runner
        def main(cfg):
            return cfg


def test_exp_manager_says_it_of_the_key(tmp_path):
    trainer = quiet_trainer(enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=r"name='\.\.' cannot be the name of a directory"):
        exp_manager(trainer, {"exp_dir": str(tmp_path), "name": ".."})
    with pytest.raises(ConfigurationError, match=r"the trainer is a str, expected a lightning.pytorch.Trainer"):
        exp_manager("x", {})
