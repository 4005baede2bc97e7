from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from toy import ToyModel, loader, quiet_trainer

import nemologger.trackers
from nemologger import NeMoLogger
from nemologger.errors import ConfigurationError
from nemologger.run.record import close_log
from nemologger.trackers import (
    ClearMLLogger,
    CometLogger,
    ContinuedSteps,
    CSVLogger,
    DLLogger,
    MLFlowLogger,
    NeptuneLogger,
)
from nemologger.trackers.tracker import KeptId


def test_the_public_names():
    names = {"ClearMLLogger", "CometLogger", "ContinuedSteps", "CSVLogger", "DLLogger", "MLFlowLogger", "NeptuneLogger"}
    assert set(nemologger.trackers.__all__) == set(dir(nemologger.trackers)) == names
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nemologger.trackers.nothing


def test_naming_and_making_them_loads_no_trackers_package():
    code = (
        "import sys; from nemologger.trackers import *; MLFlowLogger(); ClearMLLogger(); CometLogger(); CSVLogger(); "
        "DLLogger(); print(sorted({'mlflow', 'clearml', 'comet_ml', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("tracker", "package", "extra"),
    [(MLFlowLogger, "mlflow", "mlflow"), (ClearMLLogger, "clearml", "clearml"), (CometLogger, "comet_ml", "comet")],
)
def test_a_missing_package_is_an_error_with_the_command(tracker, package, extra, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == package else find(name, *rest)  # noqa: E731
    monkeypatch.setattr("nemologger.trackers.tracker.find_spec", missing)
    with pytest.raises(ConfigurationError, match=rf"{package}, which is .* pip install 'nemologger\[{extra}\]'"):
        tracker()


def test_neptune_says_that_it_is_gone_and_what_there_is():
    with pytest.raises(ConfigurationError, match=r"closed in March 2026.*MLFlowLogger"):
        NeptuneLogger(project="p", api_key="k")


def test_an_id_is_kept_for_each_store(tmp_path):
    file = tmp_path / "run" / "mlflow_id.txt"
    assert KeptId(file, "a b").read() is None
    KeptId(file, "a b").write("1")
    KeptId(file, "c").write("2")
    KeptId(file, "a b").write("3")
    assert file.read_text() == "3 a b\n2 c\n"
    assert (KeptId(file, "a b").read(), KeptId(file, "c").read(), KeptId(file).read()) == ("3", "2", None)
    KeptId(None).write("4")
    assert KeptId(None).read() is None


@pytest.mark.parametrize(
    ("make", "other", "said"),
    [
        (CSVLogger, {"name": "b"}, r"both write to .*metrics\.csv.*a name="),
        (DLLogger, {"json_file": "b.json"}, r"both write to .*dllogger\.json.*json_file="),
        (
            MLFlowLogger,
            {"experiment_name": "b"},
            "the run of experiment lightning_logs, MLflow store .*experiment_name=",
        ),
        (ClearMLLogger, None, "the ClearML task of this run"),
        (CometLogger, {"experiment_key": "b" * 32}, "the Comet experiment of this run"),
    ],
)
def test_two_of_one_place_are_refused_before_anything_is_written(tmp_path, make, other, said):
    def set_up(second) -> None:
        trainer = quiet_trainer()
        try:
            NeMoLogger(name="toy", log_dir=tmp_path, extra_loggers=[make(), second]).setup(trainer)
        finally:
            close_log(trainer)

    with pytest.raises(ConfigurationError, match=f"two loggers, .*{said}"):
        set_up(make())
    if other is not None:
        set_up(make(**other))


def test_two_of_one_place_are_refused_by_a_plain_trainer_too(tmp_path):
    loggers = [CSVLogger(save_dir=tmp_path), CSVLogger(save_dir=tmp_path)]
    with pytest.raises(ConfigurationError, match="two loggers"):
        quiet_trainer(max_steps=1, logger=loggers, callbacks=[ContinuedSteps()]).fit(ToyModel(), loader())
    assert not [*tmp_path.iterdir()]
