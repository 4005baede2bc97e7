from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemologger.run.directory import RunDirectory
from nemologger.trackers import MLFlowLogger


@pytest.fixture(autouse=True)
def no_uri(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    import mlflow

    mlflow.set_tracking_uri("")
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def logger_in(directory: Path, store: Path, **options) -> MLFlowLogger:
    logger = MLFlowLogger(**{"experiment_name": directory.name, "save_dir": store, **options})
    logger.settle(RunDirectory(directory, directory, "", ""), move=True)
    return logger


def steps(logger: MLFlowLogger, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in logger.experiment.get_metric_history(logger.run_id, name)]


def test_a_resumed_run_fills_what_is_missing_and_repeats_nothing(tmp_path, store):
    first = logger_in(tmp_path, store, prefix="p")
    for step in (0, 1, 2, 4, 5):  # 3 was lost
        first.log_metrics({"loss@1": step / 2, "only here": 1.0}, step)
    second = logger_in(tmp_path, store, prefix="p")
    second.go_on(3)
    for step in range(3, 8):
        second.log_metrics({"loss@1": step / 2}, step)
    assert second.run_id == first.run_id
    assert sorted(steps(second, "p-loss1")) == [(step, step / 2) for step in range(8)]
    assert second.experiment.get_run(second.run_id).info.status == "RUNNING"
    second.finalize("failed")
    assert second.experiment.get_run(second.run_id).info.status == "FAILED"


def test_parameters_cannot_change_and_those_that_did_are_named(tmp_path, store, caplog):
    first = logger_in(tmp_path, store)
    first.log_hyperparams({"lr": 0.1, "net": {"width": 8}})
    first.start_over()
    second = logger_in(tmp_path, store)
    second.log_hyperparams({"lr": 0.1, "net": {"width": 9}, "new": "x"})
    second.go_on(1)
    assert second.experiment.get_run(second.run_id).data.params == {"lr": "0.1", "net/width": "8", "new": "x"}
    assert "net/width was '8', is '9'" in caplog.text


def test_a_run_that_is_gone_is_a_new_one(tmp_path, store, caplog):
    first = logger_in(tmp_path, store)
    first.experiment.delete_run(first.run_id)
    second = logger_in(tmp_path, store)
    assert second.run_id != first.run_id
    assert f"MLflow run {first.run_id}, which this run logged to, is gone" in caplog.text
    (tmp_path / "mlflow_id.txt").write_text(f"{'0' * 32} here {tmp_path.name}\n")
    assert logger_in(tmp_path, store).run_id not in {first.run_id, second.run_id}


def test_what_waits_is_written_at_a_checkpoint_and_at_the_end(tmp_path, store):
    logger = logger_in(tmp_path, store, synchronous=False)
    logger.log_metrics({"loss": 0.5}, 0)
    logger.after_save_checkpoint(SimpleNamespace())
    assert steps(logger, "loss") == [(0, 0.5)]
    logger.log_metrics({"loss": 0.2}, 1)
    logger.finalize("success")
    assert steps(logger, "loss") == [(0, 0.5), (1, 0.2)]


def test_the_experiment_is_the_runs_if_none_is_named(tmp_path, store):
    logger = MLFlowLogger(experiment_name=None, save_dir=store)
    logger.settle(RunDirectory(tmp_path, tmp_path, "of the run", "v"), move=True)
    assert logger.experiment.get_experiment(logger.experiment_id).name == "of the run"


def test_an_id_that_was_given_wins(tmp_path, store):
    mine, other = logger_in(tmp_path, store), logger_in(tmp_path / "other", store)
    assert mine.run_id != other.run_id
    mine.log_metrics({"a": 1.0}, 0)
    given = logger_in(tmp_path / "third", store, run_id=mine.run_id)
    given.start_over()
    assert given.run_id == mine.run_id


def test_one_run_does_not_lead_the_next_into_its_store(tmp_path, store):
    _ = logger_in(tmp_path, store).experiment
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert MLFlowLogger().save_dir == str(Path.cwd() / "mlruns")


def test_the_server_of_the_environment_is_used_and_its_password_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example:5000/x")
    logger = logger_in(tmp_path, "mlruns")
    assert logger.save_dir is None
    logger._kept_id().write("1")
    assert (tmp_path / "mlflow_id.txt").read_text() == f"1 https://mlflow.example:5000/x {tmp_path.name}\n"


@pytest.mark.parametrize(("wanted", "there"), [(True, ["b", "c"]), ("all", ["a", "b", "c"]), (False, [])])
def test_checkpoints_as_artifacts(tmp_path, store, wanted, there):
    logger = logger_in(tmp_path / str(wanted), store, log_model=wanted)
    _ = logger.experiment
    kept: dict[str, float] = {}
    for name in "abc":
        checkpoint = tmp_path / name
        (checkpoint / "weights").mkdir(parents=True)
        (checkpoint / "weights" / "w").write_text(name)
        kept = {**dict([*kept.items()][-1:]), str(checkpoint): 1.0}
        callback = SimpleNamespace(best_k_models=kept, best_model_path=str(checkpoint), last_model_path="")
        logger.after_save_checkpoint(callback)
    logger.finalize("success")
    artifacts = store / "artifacts"
    found = sorted(artifacts.rglob(f"{logger.run_id}/artifacts/checkpoints/*"))
    assert [path.name for path in found] == there
    assert all((path / "weights" / "w").read_text() == path.name for path in found)


def test_other_ranks_open_nothing(tmp_path, monkeypatch):
    from lightning_utilities.core.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = logger_in(tmp_path, tmp_path / "db")
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert (logger.version, logger.name, logger.is_open) == (None, None, False)
    assert not [*tmp_path.iterdir()]


def test_a_name_that_mlflow_refuses_does_not_take_the_others_along(tmp_path, store, caplog):
    """It refuses a whole batch. Lightning leaves nothing of a name without Latin letters."""
    logger = logger_in(tmp_path, store)
    logger.start_over()
    logger.log_hyperparams({"width": 8, "/lead": 1, "depth": 2})
    for step in range(3):
        logger.log_metrics({"loss": 0.5, "потери": 0.25, "accuracy": 0.75}, step)
    logger.finalize()
    about = logger.experiment.get_run(logger.run_id).data
    assert about.params == {"width": "8", "depth": "2"}
    assert about.metrics == {"loss": 0.5, "accuracy": 0.75}
    assert [m.step for m in logger.experiment.get_metric_history(logger.run_id, "loss")] == [0, 1, 2]
    left_out = [r.getMessage() for r in caplog.records if "MLflow refuses" in r.getMessage()]
    assert [said.split(",")[0] for said in left_out] == ["MLflow refuses '/lead'", "MLflow refuses 'потери'"]
