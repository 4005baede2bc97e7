from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from nemologger.errors import ConfigurationError
from nemologger.run.directory import (
    RunDirectory,
    Version,
    check_local,
    check_name,
    choose_version,
    explicit_directory,
    is_log_file,
    rank_log,
    run_directory,
)

NOON = datetime(2026, 11, 20, 12, 0, 5, tzinfo=UTC)
HERE = Path("/place/here")


@pytest.mark.parametrize(
    ("given", "variable", "resume", "use_datetime", "expected"),
    [
        ("v1", "env", True, True, Version("v1")),
        ("v1", None, False, True, Version("v1")),
        (None, "env", True, True, Version("env")),
        (None, "env", False, False, Version("env")),
        (None, "", True, True, Version(None)),
        (None, None, True, True, Version(None)),
        (None, None, False, True, Version("2026-11-20_12-00-05", dated=True)),
        (None, None, False, False, Version(None)),
        ("", None, False, False, Version(None)),
    ],
)
def test_version_is_given_else_from_the_environment_else_none_to_resume_else_the_time(
    given, variable, resume, use_datetime, expected
):
    environment = {} if variable is None else {"NEMO_EXPM_VERSION": variable}
    chosen = choose_version(
        given, environment=environment, resume_if_exists=resume, use_datetime_version=use_datetime, now=NOON
    )
    assert chosen == expected


def test_a_bad_version_in_the_environment_is_named_by_its_variable():
    with pytest.raises(ConfigurationError, match="NEMO_EXPM_VERSION"):
        choose_version(
            None,
            environment={"NEMO_EXPM_VERSION": "../x"},
            resume_if_exists=False,
            use_datetime_version=True,
            now=NOON,
        )


def test_directory_is_base_name_version():
    assert run_directory("mnist", "v1", log_dir=None, here=HERE) == RunDirectory(
        HERE / "nemo_experiments", HERE / "nemo_experiments/mnist/v1", "mnist", "v1"
    )
    without = run_directory("mnist", None, log_dir="runs/../base", here=HERE)
    assert (without.exp_dir, without.log_dir) == (HERE / "base", HERE / "base/mnist")
    assert without.checkpoint_dir == HERE / "base/mnist/checkpoints"
    assert run_directory("a", None, log_dir="~/runs", here=HERE).exp_dir == Path.home() / "runs"


def test_explicit_directory_has_no_name_and_no_version():
    assert explicit_directory("mine", here=HERE) == RunDirectory(HERE / "mine", HERE / "mine", "", "")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a\\b", "../a", "a{b}", "a\nb", "a\0b", None, 3])
def test_a_name_is_one_directory_name(name):
    with pytest.raises(ConfigurationError, match="name"):
        check_name(name, "name")


@pytest.mark.parametrize("name", ["a", "Llama 3.1-8B_x=1", "2026-11-20_12-00-05", "ünï", "..."])
def test_ordinary_names_are_taken_as_they_are(name):
    assert check_name(name, "name") == name


def test_an_address_is_no_run_directory():
    with pytest.raises(ConfigurationError, match="s3://bucket"):
        check_local("s3://bucket/runs", "log_dir")
    check_local("/a:b/c", "log_dir")
    check_local(None, "log_dir")


@pytest.mark.parametrize(
    ("save_dir", "expected"),
    [
        ("tb", "/base/tb"),
        (".", "/base"),
        ("/place/here/tb", "/base/tb"),
        ("/place/here", "/base"),
        ("/root_dir/tb", "/base/tb"),
        ("/place/here/inner/tb", "/base/tb"),
        ("/elsewhere/tb", "/elsewhere/tb"),
        ("/place/here2/tb", "/place/here2/tb"),
        ("/base/name/tb", "/base/name/tb"),
    ],
)
def test_a_tracker_writes_below_the_base_unless_it_was_sent_elsewhere(save_dir, expected):
    run = RunDirectory(Path("/base"), Path("/base/name"), "name", None)
    assert run.tracker_dir(save_dir, [HERE, "/root_dir", "/place/here/inner"]) == Path(expected)


def test_log_files_of_one_life_are_known_by_name():
    assert rank_log(12, 3) == "nemo_log_globalrank-12_localrank-3.txt"
    assert is_log_file(rank_log(12, 3))
    for name in ("cmd-args.log", "git-info.log", "task.json", "nemo_error_log.txt", "lightning_logs.txt"):
        assert is_log_file(name)
    for name in ("wandb_id.txt", "events.out.tfevents.1.a", "hparams.yaml", "notes.txt"):
        assert not is_log_file(name)
