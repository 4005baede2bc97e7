"""What ``import nemologger`` offers, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import nemologger

PUBLIC = {
    "AutoResume", "CheckpointError", "CheckpointMisconfigurationError", "exp_manager",
    "LoggerMisconfigurationError", "ConfigurationError", "ContextError", "DamagedCheckpointError", "default_log",
    "default_resume", "DirectoryInUseError", "export_weights", "finetune", "hydra_runner", "io", "load_model",
    "load_weights", "ModelCheckpoint", "ModelMismatchError", "NeMoLogger", "NemologgerError", "NotFoundError", "pretrain",
    "RankError", "RefusedError", "RestoreConfig", "Resumed", "run_of", "RunCompletedError", "RunDirectory",
    "SaveFailedError", "sweep_job", "SweepError", "SweepJob",
    "tensorboard_logger", "train", "Trainer", "UnfinishedCheckpointError", "use_one_lightning", "validate",
    "Verification", "verify_checkpoint", "wandb_logger",
}  # fmt: skip


def test_the_public_names():
    assert set(nemologger.__all__) == PUBLIC
    assert set(dir(nemologger)) == PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nemologger.nothing


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_is_there_and_documented(name):
    assert inspect.getdoc(getattr(nemologger, name))


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, nemologger; heavy = {'torch', 'lightning', 'fiddle', 'wandb', 'tensorboard'} & set(sys.modules); "
        "print(sorted(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_trackers_are_imported_when_they_are_used():
    code = (
        "import sys; from nemologger import NeMoLogger, ModelCheckpoint, AutoResume, Trainer, train; "
        "print(sorted({'wandb', 'tensorboard'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
