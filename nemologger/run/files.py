"""The files that say how a run was started: its command, its code, its configuration. Written once, by rank 0."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemologger.disk import Disk, LocalDisk
from nemologger.disk.there import exists, is_dir, is_file
from nemologger.errors import ConfigurationError, NemologgerError, NotFoundError
from nemologger.run.directory import (
    COMMAND,
    GIT_INFO,
    TASK,
    WANDB_ID,
    RunDirectory,
    absolute,
    earlier_life,
    is_log_file,
    next_version,
)

# A diff is there to read; a data file that somebody forgot to ignore is not.
GIT_DIFF_LIMIT = 1 << 20
GIT_PATIENCE = 10.0  # seconds
_CHUNK = 16 << 20


def create(directory: Path, *, fresh: bool = False) -> Path:
    """Create ``directory`` and return it.

    Args:
        directory: Absolute path.
        fresh: It must be a new one: if it is there, ``_2``, ``_3``, … is appended to its name.

    Raises:
        ConfigurationError: It cannot be created.
    """
    disk = LocalDisk()
    with _writing_to(directory):
        if not fresh:
            disk.make_directory(directory)
            return directory
        disk.make_directory(directory.parent)
        for count in itertools.count(1):
            chosen = directory if count == 1 else directory.with_name(f"{directory.name}_{count}")
            try:
                # Not the disk's, which takes one that is there: many jobs may start within one second.
                chosen.mkdir()
            except FileExistsError:
                continue
            break
    return chosen


def create_numbered(parent: Path) -> Path:
    """Create the first free one of ``version_0``, ``version_1``, … in ``parent`` and return it.

    Raises:
        ConfigurationError: It cannot be created.
    """
    with _writing_to(parent):
        LocalDisk().make_directory(parent)
        while True:
            chosen = parent / next_version(path.name for path in parent.iterdir())
            try:
                chosen.mkdir()  # not the disk's, which takes one that is there
            except FileExistsError:
                continue  # another job was faster
            return chosen


def to_copy(files: Sequence[str | Path], here: Path) -> dict[str, Path]:
    """What ``files`` will be called in the run directory, and where each is now.

    A file named twice is copied once. Of two different files of one name, the second is called ``name_1.suffix``.

    Raises:
        ConfigurationError: ``files`` is not a list of paths, or one is a directory.
        NotFoundError: A file is not there.
    """
    if isinstance(files, (str, Path)):
        raise ConfigurationError(f"files_to_copy must be a list of paths, found {files!r}; write [{str(files)!r}].")
    if not isinstance(files, Iterable):
        raise ConfigurationError(f"files_to_copy must be a list of paths, found {files!r}.")
    chosen: dict[str, Path] = {}
    for file in files:
        if not isinstance(file, (str, os.PathLike)):
            raise ConfigurationError(f"files_to_copy must be a list of paths, found {file!r} in it.")
        path = absolute(file, here)
        if is_dir(path):
            raise ConfigurationError(f"files_to_copy: {path} is a directory; name the files in it that matter.")
        if not is_file(path):
            raise NotFoundError(f"files_to_copy: there is no file {path} (given as {str(file)!r}, seen from {here}).")
        if path in chosen.values():
            continue
        name, count = path.name, 0
        while name in chosen or is_log_file(name) or name == WANDB_ID:
            count += 1
            name = f"{path.stem}_{count}{path.suffix}"
        chosen[name] = path
    return chosen


def put_aside(directory: Path, also: Sequence[str] = (), *, disk: Disk | None = None) -> Path | None:
    """Move the log files of an earlier life of the run in ``directory`` to a new ``run_<n>/``.

    They are gathered in a hidden directory that gets its name last. If the process dies in between, the next call goes
    on with the same one: no file is lost, and none ends up in the ``run_<n>`` of another life.

    Args:
        directory: The run directory.
        also: Names of further files to move, if they are there.
        disk: The file system.

    Returns:
        The new directory; None if there was no earlier life.
    """
    disk = disk or LocalDisk()
    gathered = directory / ".run.partial"
    with _writing_to(directory):
        there = sorted(directory.iterdir())
        earlier = [file for file in there if is_file(file) and (is_log_file(file.name) or file.name in also)]
        if not earlier and not exists(gathered):
            return None
        number = 0
        while os.path.lexists(directory / earlier_life(number)):
            number += 1
        target = directory / earlier_life(number)
        disk.make_directory(gathered)
        for file in earlier:
            disk.rename(file, gathered / file.name)
        disk.sync(gathered)
        disk.rename(gathered, target)
        disk.sync(directory)
    return target


def write(
    run: RunDirectory,
    copies: dict[str, Path],
    task: Any = None,
    *,
    here: Path,
    arguments: Sequence[str] | None = None,
    disk: Disk | None = None,
) -> list[str]:
    """Write ``cmd-args.log``, ``git-info.log``, ``task.json`` and the copies into the run directory.

    Args:
        run: Where; its directory exists.
        copies: Name in the run directory to the file, from :func:`to_copy`.
        task: What fiddle is to write to ``task.json``; None for no such file.
        here: The working directory of the command.
        arguments: The command's; None for this process's.
        disk: The file system.

    Returns:
        Warnings: what could not be written though the run can do without.

    Raises:
        ConfigurationError: The directory cannot be written to.
    """
    disk = disk or LocalDisk()
    notes = []
    with _writing_to(run.log_dir):
        command = shlex.join(sys.argv if arguments is None else arguments)
        text = f"{command}\n# in {here}\n# by {sys.executable}\n"
        disk.write(run.log_dir / COMMAND, [text.encode(errors="surrogateescape")])
        code = git_info(here)
        if code is not None:
            disk.write(run.log_dir / GIT_INFO, [code])
        for name, path in copies.items():
            disk.write(run.log_dir / name, _chunks(path))
        if task is not None:
            try:
                described = _as_json(task)
            except Exception as error:  # noqa: BLE001  a description that cannot be made must not cost the run
                notes.append(
                    f"{TASK} is not written: fiddle cannot serialize the task_config of type "
                    f"{type(task).__name__} ({type(error).__name__}: {error})."
                )
            else:
                disk.write(run.log_dir / TASK, [described.encode()])
        disk.sync(run.log_dir)
    return notes


def git_info(directory: Path) -> bytes | None:
    """Hash, branch and changes of the repository around ``directory``; None outside of one, or without git."""
    revision = _git(directory, "rev-parse", "HEAD")
    if revision is None:
        return None
    branch = _git(directory, "rev-parse", "--abbrev-ref", "HEAD") or b"unknown\n"
    # No helper that the repository's configuration names is started.
    diff = _git(directory, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") or b""
    if len(diff) > GIT_DIFF_LIMIT:
        diff = diff[:GIT_DIFF_LIMIT] + f"\n… cut off after {GIT_DIFF_LIMIT} bytes\n".encode()
    return b"commit hash: " + revision + b"branch: " + branch + b"\n" + diff


def _git(directory: Path, *arguments: str) -> bytes | None:
    """What git prints, up to a little more than the limit; None if it fails."""
    command = ["git", "--no-pager", "-c", "core.fsmonitor=false", *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    impatience = threading.Timer(GIT_PATIENCE, process.kill)
    impatience.start()
    with process:
        try:
            text = process.stdout.read(GIT_DIFF_LIMIT + 1) if process.stdout is not None else b""
            cut_off = len(text) > GIT_DIFF_LIMIT
            if cut_off:
                process.kill()
            process.wait()
        finally:
            impatience.cancel()
            impatience.join()
    return text if cut_off or process.returncode == 0 else None


def _as_json(task: Any) -> str:
    # Here, not above: a run without a fiddle task does not wait for fiddle.
    from fiddle.experimental import serialization

    return str(serialization.dump_json(task))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


@contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    try:
        yield
    except NemologgerError:
        raise
    except (FileNotFoundError, FileExistsError) as error:  # what was just made is gone, or there already
        raise ConfigurationError(
            f"the run directory {directory} changed while it was made ready ({type(error).__name__}: {error}): another run "
            "may have started in it at the same moment. Stop one, or give this run another name or version; if there is "
            "none, start again."
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to the run directory {directory}: {type(error).__name__}: {error}. Make it writable, free "
            "some space, or choose another place with log_dir (exp_manager: exp_dir) or explicit_log_dir."
        ) from error
