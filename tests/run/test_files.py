from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fiddle as fdl
import pytest

from nemologger.disk import LocalDisk
from nemologger.errors import ConfigurationError, NotFoundError
from nemologger.run import files as run_files
from nemologger.run.directory import RunDirectory


def run_in(directory: Path) -> RunDirectory:
    directory.mkdir(exist_ok=True)
    return RunDirectory(directory, directory, "", "")


# --- the directory ----------------------------------------------------------------------------------------------------


def test_a_fresh_directory_is_never_one_that_was_there(tmp_path):
    wanted = tmp_path / "base" / "name" / "2026-11-20"
    made = [run_files.create(wanted, fresh=True) for _ in range(3)]
    assert [path.name for path in made] == ["2026-11-20", "2026-11-20_2", "2026-11-20_3"]
    assert all(path.is_dir() for path in made)
    assert run_files.create(wanted) == wanted


def test_a_directory_that_cannot_be_made_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    for fresh in (False, True):
        with pytest.raises(ConfigurationError, match=r"file/run.*choose another place with log_dir"):
            run_files.create(tmp_path / "file" / "run", fresh=fresh)


# --- files_to_copy ----------------------------------------------------------------------------------------------------


def test_files_of_one_name_both_survive(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(name)
    copies = run_files.to_copy(["a/config.yaml", tmp_path / "b/config.yaml", "a/config.yaml"], tmp_path)
    run = run_in(tmp_path / "run")
    run_files.write(run, copies, here=tmp_path)
    assert (run.log_dir / "config.yaml").read_text() == "a"
    assert (run.log_dir / "config_1.yaml").read_text() == "b"
    assert len(copies) == 2


def test_a_copy_never_takes_the_name_of_a_log_file(tmp_path):
    (tmp_path / "task.json").write_text("mine")
    (tmp_path / "wandb_id.txt").write_text("mine")
    assert [*run_files.to_copy(["task.json", "wandb_id.txt"], tmp_path)] == ["task_1.json", "wandb_id_1.txt"]


def test_a_missing_file_a_directory_and_a_bare_string_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match=r"no file .*/gone\.yaml") as error:
        run_files.to_copy(["gone.yaml"], tmp_path)
    assert isinstance(error.value, FileNotFoundError)
    with pytest.raises(ConfigurationError, match="is a directory"):
        run_files.to_copy([tmp_path], tmp_path)
    with pytest.raises(ConfigurationError, match=r"\['conf.yaml'\]"):
        run_files.to_copy("conf.yaml", tmp_path)
    for wrong in (-3, [-3]):
        with pytest.raises(ConfigurationError, match="a list of paths, found"):
            run_files.to_copy(wrong, tmp_path)


# --- command, task ----------------------------------------------------------------------------------------------------


def test_the_command_can_be_pasted_into_a_shell(tmp_path):
    run = run_in(tmp_path / "run")
    run_files.write(run, {}, here=tmp_path, arguments=["train.py", "--name", "a b", "x'y"])
    text = (run.log_dir / "cmd-args.log").read_text()
    assert text.splitlines()[0] == """train.py --name 'a b' 'x'"'"'y'"""
    assert f"# in {tmp_path}" in text
    shown = subprocess.run(["sh", "-c", text.replace("train.py", "printf '%s|'", 1)], capture_output=True, text=True)
    assert shown.stdout == "--name|a b|x'y|"


def test_the_command_of_this_process_is_the_default(tmp_path):
    run = run_in(tmp_path / "run")
    run_files.write(run, {}, here=tmp_path)
    assert sys.argv[0] in (tmp_path / "run" / "cmd-args.log").read_text()


def build_me(x: int) -> int:
    return x


def test_the_fiddle_task_is_kept_and_can_be_read_again(tmp_path):
    from fiddle.experimental import serialization

    task = fdl.Config(build_me, x=3)
    run = run_in(tmp_path / "run")
    assert run_files.write(run, {}, task, here=tmp_path) == []
    text = (run.log_dir / "task.json").read_text()
    assert serialization.load_json(text) == task
    assert json.loads(text)["root"]


def test_a_task_that_cannot_be_serialized_costs_only_its_file(tmp_path):
    run = run_in(tmp_path / "run")
    notes = run_files.write(run, {}, fdl.Config(build_me, x=object()), here=tmp_path)
    assert len(notes) == 1
    assert "task.json" in notes[0]
    assert not (run.log_dir / "task.json").exists()
    assert (run.log_dir / "cmd-args.log").exists()


def test_a_full_disk_is_a_clear_error(tmp_path):
    class Full(LocalDisk):
        def write(self, path, parts):
            raise OSError(28, "No space left on device")

    with pytest.raises(ConfigurationError, match="No space left on device"):
        run_files.write(run_in(tmp_path / "run"), {}, here=tmp_path, disk=Full())


def test_a_disk_that_does_not_answer_when_log_files_are_put_aside_is_a_clear_error(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "iterdir", stale)
    with pytest.raises(
        ConfigurationError, match=rf"run directory {tmp_path}: .*Stale file handle.*choose another place"
    ):
        run_files.put_aside(tmp_path)


def test_a_second_run_that_starts_at_the_same_moment_is_named(tmp_path):
    class Raced(LocalDisk):
        def write(self, path, parts):
            def raced():
                yield from parts
                path.with_name(f".{path.name}.partial").unlink()  # the other one has renamed it

            super().write(path, raced())

    with pytest.raises(ConfigurationError, match=r"another run may have started in it.*another name or version"):
        run_files.write(run_in(tmp_path / "run"), {}, here=tmp_path, disk=Raced())


# --- git --------------------------------------------------------------------------------------------------------------

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=trunk"]
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path / "repo", check=True, capture_output=True)

    (tmp_path / "repo").mkdir()
    git("init")
    (tmp_path / "repo" / "code.py").write_text("old = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path / "repo"


@needs_git
def test_git_info_has_hash_branch_and_diff(repository):
    (repository / "code.py").write_text("new = 2\n")
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True
    ).stdout.strip()
    text = run_files.git_info(repository).decode()
    assert text.splitlines()[:2] == [f"commit hash: {revision}", "branch: trunk"]
    assert "-old = 1" in text
    assert "+new = 2" in text


@needs_git
def test_a_huge_diff_is_cut_off(repository, monkeypatch):
    monkeypatch.setattr(run_files, "GIT_DIFF_LIMIT", 1000)
    (repository / "code.py").write_text("x\n" * 500_000)
    text = run_files.git_info(repository)
    assert len(text) < 1200
    assert text.decode().endswith("cut off after 1000 bytes\n")


@needs_git
def test_helpers_that_the_repository_configures_are_not_run(repository, tmp_path):
    for key in ("diff.external", "core.fsmonitor"):
        subprocess.run(["git", "config", key, f"touch {tmp_path}/ran; true"], cwd=repository, check=True)
    (repository / "code.py").write_text("new = 2\n")
    assert b"+new = 2" in run_files.git_info(repository)
    assert not (tmp_path / "ran").exists()


@needs_git
def test_outside_a_repository_there_is_silently_no_git_info(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    run = run_in(tmp_path / "run")
    with caplog.at_level(logging.DEBUG):
        assert run_files.write(run, {}, here=tmp_path) == []
    assert not (run.log_dir / "git-info.log").exists()
    assert not [record for record in caplog.records if record.name.startswith("nemologger")]


@needs_git
def test_a_repository_without_a_commit_or_a_machine_without_git_is_no_error(tmp_path, monkeypatch):
    subprocess.run(["git", "init"], cwd=tmp_path, check=True, capture_output=True)
    assert run_files.git_info(tmp_path) is None
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert run_files.git_info(tmp_path) is None


@needs_git
def test_git_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(run_files, "GIT_PATIENCE", 0.2)
    assert run_files.git_info(tmp_path) is None


# --- the files of earlier lives ---------------------------------------------------------------------------------------

LOGS = ["cmd-args.log", "lightning_logs.txt", "nemo_error_log.txt", "nemo_log_globalrank-0_localrank-0.txt"]
STAY = ["events.out.tfevents.1.host", "wandb_id.txt", "hparams.yaml"]


def live(directory: Path, life: int) -> None:
    directory.mkdir(exist_ok=True)
    for name in LOGS:
        (directory / name).write_text(f"life {life}")


def test_each_life_gets_its_own_directory_and_the_rest_stays(tmp_path):
    run = tmp_path / "run"
    live(run, 0)
    for name in STAY:
        (run / name).write_text("stays")
    (run / "checkpoints").mkdir()
    for life in range(3):
        assert run_files.put_aside(run) == run / f"run_{life}"
        assert sorted(path.name for path in (run / f"run_{life}").iterdir()) == sorted(LOGS)
        assert (run / f"run_{life}" / LOGS[0]).read_text() == f"life {life}"
        assert sorted(path.name for path in run.iterdir() if path.is_file()) == sorted(STAY)
        live(run, life + 1)
    assert (run / "checkpoints").is_dir()


def test_without_an_earlier_life_nothing_moves(tmp_path):
    assert run_files.put_aside(tmp_path) is None
    assert not [*tmp_path.iterdir()]


def test_a_copy_that_would_be_overwritten_moves_too(tmp_path):
    live(tmp_path / "run", 0)
    (tmp_path / "run" / "config.yaml").write_text("earlier")
    run_files.put_aside(tmp_path / "run", ["config.yaml"])
    assert (tmp_path / "run" / "run_0" / "config.yaml").read_text() == "earlier"


class Dies(LocalDisk):
    """Dies at its n-th change."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _count(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1

    def make_directory(self, path):
        self._count()
        super().make_directory(path)

    def rename(self, source, target):
        self._count()
        super().rename(source, target)

    def sync(self, directory):
        self._count()
        super().sync(directory)


@pytest.mark.parametrize("at", range(len(LOGS) + 4))
def test_dying_while_files_move_loses_none_and_splits_no_life(tmp_path, at):
    run = tmp_path / "run"
    live(run, 0)
    run_files.put_aside(run)
    live(run, 1)
    with pytest.raises(KeyboardInterrupt):
        run_files.put_aside(run, disk=Dies(at))
    run_files.put_aside(run)
    assert sorted(path.name for path in run.iterdir()) == ["run_0", "run_1"]
    for life in (0, 1):
        found = {path.name: path.read_text() for path in (run / f"run_{life}").iterdir()}
        assert found == dict.fromkeys(LOGS, f"life {life}")
