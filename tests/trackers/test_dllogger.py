from __future__ import annotations

import json
import math
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.sections import bare_trainer, ckpt, fit

from nemologger.exp_manager import exp_manager
from nemologger.run.directory import RunDirectory
from nemologger.trackers import DLLogger


def logger_in(directory: Path, **options) -> DLLogger:
    logger = DLLogger(**options)
    logger.settle(RunDirectory(directory, directory, "", ""), move=True)
    return logger


def entries(path: Path) -> list[dict]:
    return [json.loads(line.removeprefix("DLLL ")) for line in path.read_text().splitlines()]


def test_a_line_has_the_fields_of_dlloggers_in_their_order(tmp_path):
    logger = logger_in(tmp_path)
    logger.log_metrics({"loss": torch.tensor(0.5), "rate": np.float32(2), "n": 3}, 7)
    logger.log_metrics({"final": 1.0})
    logger.experiment.metadata("rate", {"unit": "images/s"})
    text = (tmp_path / "dllogger.json").read_text()
    assert all(line.startswith('DLLL {"timestamp": "') for line in text.splitlines())
    metrics, summary, metadata = entries(tmp_path / "dllogger.json")
    assert [*metrics] == ["timestamp", "datetime", "elapsedtime", "type", "step", "data"]
    assert (metrics["type"], metrics["step"]) == ("LOG", 7)
    assert metrics["data"] == {"loss": 0.5, "rate": 2.0, "n": 3}
    assert (summary["step"], summary["data"]) == ([], {"final": 1.0})
    assert (metadata["type"], metadata["metric"], metadata["metadata"]) == ("METADATA", "rate", {"unit": "images/s"})


COMMON = {"timestamp", "datetime", "elapsedtime", "type"}
NUMBER = re.compile(r"\d+(\.\d+)?(e-\d+)?")


def read_as_dlloggers_readers_do(path: Path) -> dict[str, list]:
    """What the lines hold, by the kind of their step, after every rule that readers of such files go by.

    The rules are those of JSONStreamBackend, which its README describes: the package has no reader of its own, and no
    release in an index.
    """
    found: dict[str, list] = {"PARAMETER": [], "step": [], "summary": [], "METADATA": []}
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        assert line[:5] == "DLLL "
        entry = json.loads(line[5:])
        assert NUMBER.fullmatch(entry["timestamp"]), "seconds, as text"
        assert NUMBER.fullmatch(entry["elapsedtime"]), "seconds, as text"
        assert datetime.fromisoformat(entry["datetime"]).timestamp() == float(entry["timestamp"])
        if entry["type"] == "METADATA":
            assert set(entry) == {*COMMON, "metric", "metadata"}
            found["METADATA"].append({entry["metric"]: entry["metadata"]})
            continue
        assert entry["type"] == "LOG"
        assert set(entry) == {*COMMON, "step", "data"}
        step = entry["step"]
        kind = "PARAMETER" if step == "PARAMETER" else "step" if step != [] else "summary"
        for value in entry["data"].values():
            assert kind == "PARAMETER" or value is None or isinstance(value, (int, float)), (
                "a reader calculates with it"
            )
        found[kind].append((step, entry["data"]) if kind == "step" else entry["data"])
    return found


def test_readers_of_dlloggers_files_read_ours(tmp_path):
    logger = logger_in(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "name": "é\n\u2028", "none": None, "net": {"width": 8}, "list": [1, 2]})
    logger.start_over()
    logger.experiment.metadata("loss", {"unit": "nat", "format": ":.3f"})
    logger.log_metrics({"loss": torch.tensor(0.5), "n": np.int64(3), "flag": torch.tensor(True)}, 0)
    logger.log_metrics({"loss": float("nan"), "tiny": 1e-30}, 1)
    logger.experiment.log((0, 12), {"loss": 0.25})  # epoch and iteration
    logger.log_metrics({"best": 0.25})
    logger.finalize("success")
    found = read_as_dlloggers_readers_do(tmp_path / "dllogger.json")
    assert found["METADATA"] == [{"loss": {"unit": "nat", "format": ":.3f"}}]
    (parameters,) = found["PARAMETER"]
    assert (parameters["lr"], parameters["name"], parameters["none"], parameters["net/width"]) == (
        0.1,
        "é\n\u2028",
        None,
        8,
    )
    (first, (_, not_a_number), last) = found["step"]
    assert first == (0, {"loss": 0.5, "n": 3, "flag": True})
    assert math.isnan(not_a_number["loss"])
    assert last == ([0, 12], {"loss": 0.25})
    assert found["summary"] == [{"best": 0.25}]


def test_readers_read_what_a_run_and_its_resume_have_written(tmp_path):
    for stop in (6, 10):
        trainer = bare_trainer(max_steps=stop, log_every_n_steps=2, default_root_dir=tmp_path)
        section = {
            **ckpt(every_n_train_steps=4),
            "create_dllogger_logger": True,
            "explicit_log_dir": str(tmp_path / "run"),
        }
        exp_manager(trainer, {**section, "resume_if_exists": True, "resume_ignore_no_checkpoint": True})
        fit(trainer)
    found = read_as_dlloggers_readers_do(tmp_path / "run" / "dllogger.json")
    steps = [step for step, data in found["step"] if "train_loss" in data]
    assert steps == sorted({*steps})
    assert steps[-1] == 9


def test_it_goes_on_before_the_step_that_comes_again(tmp_path):
    first = logger_in(tmp_path)
    first.log_hyperparams({"lr": 0.1, "net": {"width": 8, "act": torch.relu}, "path": Path("x")})
    first.start_over()
    for step in range(6):
        first.log_metrics({"loss": step / 2}, step)
    file = tmp_path / "dllogger.json"
    file.write_text(file.read_text() + "a line of somebody else\n" + 'DLLL {"timestamp": "17')
    second = logger_in(tmp_path)
    second.log_hyperparams({"lr": 0.1, "net": {"width": 8, "act": torch.relu}, "path": Path("x")})
    second.go_on(4)
    second.log_metrics({"loss": 2.5}, 4)
    lines = file.read_text().splitlines()
    assert lines.pop(-2) == "a line of somebody else"
    file.write_text("\n".join(lines) + "\n")
    parameters, *metrics = entries(file)
    assert parameters["step"] == "PARAMETER"
    assert parameters["data"] == {"lr": 0.1, "net/width": 8, "net/act": "relu", "path": "x"}
    assert [(entry["step"], entry["data"]["loss"]) for entry in metrics] == [
        (0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.5)
    ]  # fmt: skip


def test_steps_that_only_the_model_knows_are_left_out_when_they_come_again(tmp_path):
    first = logger_in(tmp_path)
    for step in (100, 250):
        first.log_metrics({"loss": 0.5}, step)
    second = logger_in(tmp_path)
    second.go_on(None)
    for step in (250, 300):
        second.log_metrics({"loss": 0.5}, step)
    assert [entry["step"] for entry in entries(tmp_path / "dllogger.json")] == [100, 250, 300]


def test_parameters_that_changed_are_logged_again(tmp_path):
    for lr in (0.1, 0.1, 0.2):
        logger = logger_in(tmp_path)
        logger.log_hyperparams({"lr": lr})
        logger.go_on(0)
    assert [entry["data"] for entry in entries(tmp_path / "dllogger.json")] == [{"lr": 0.1}, {"lr": 0.2}]


@pytest.mark.parametrize("resumed", [False, True])
def test_parameters_wait_for_the_run_that_is_logged_to_even_if_the_model_logs_before(tmp_path, resumed):
    for life in range(2):
        logger = logger_in(tmp_path)
        logger.log_hyperparams({"life": life})
        logger.log_metrics({"early": float(life)}, 0)  # in on_fit_start
        logger.go_on(1) if resumed and life else logger.start_over()
        logger.log_metrics({"loss": float(life)}, 1)
        logger.finalize("success")
    expected = [{"early": 1.0}, {"life": 1}, {"loss": 1.0}]
    if resumed:
        first = [{"early": 0.0}, {"life": 0}]
        assert [e["data"] for e in entries(tmp_path / "dllogger.json")] == [*first, *expected]
    else:
        assert [e["data"] for e in entries(tmp_path / "dllogger.json")][-2:] == expected[1:]


def test_a_run_without_training_writes_its_parameters_at_the_end(tmp_path):
    logger = logger_in(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert [e["data"] for e in entries(tmp_path / "dllogger.json")] == [{"lr": 0.1}]


def test_a_run_that_starts_over_puts_the_earlier_file_aside(tmp_path):
    for life in range(2):
        logger = logger_in(tmp_path)
        logger.log_hyperparams({"life": life})
        logger.start_over()
        logger.log_metrics({"loss": float(life)}, 0)
    assert [e["data"] for e in entries(tmp_path / "dllogger-0.json")] == [{"life": 0}, {"loss": 0.0}]
    assert [e["data"] for e in entries(tmp_path / "dllogger.json")] == [{"life": 1}, {"loss": 1.0}]


def test_the_console_and_verbosity(tmp_path, capsys):
    quiet, verbose = logger_in(tmp_path, json_file=None, stdout=True), logger_in(tmp_path, verbose=True)
    quiet.experiment.metadata("loss", {"unit": "nat"})
    for logger in (quiet, verbose):
        logger.log_metrics({"loss": 0.5}, 3)
        logger.experiment.log(3, {"detail": 1}, verbosity=1)
    printed = capsys.readouterr().out
    assert printed.startswith("DLL 20")
    assert printed.endswith(" - 3 loss : 0.5 nat\n")
    assert [entry["data"] for entry in entries(tmp_path / "dllogger.json")] == [{"loss": 0.5}, {"detail": 1}]


def test_one_that_logs_nothing_says_so(caplog):
    DLLogger(json_file=None)
    assert "DLLogger logs nothing" in caplog.text


def test_where_it_writes(tmp_path):
    assert logger_in(tmp_path, json_file="logs/d.json").save_dir == str(tmp_path / "logs")
    assert logger_in(tmp_path, json_file="/elsewhere/d.json").save_dir == "/elsewhere"
    assert logger_in(tmp_path, json_file=None).save_dir is None
