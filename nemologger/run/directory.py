"""Where a run writes: name and version to a frozen :class:`RunDirectory`. Decisions only; no disk is touched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nemologger import names
from nemologger.condition import kind_of
from nemologger.errors import ConfigurationError

VERSION_VARIABLE = "NEMO_EXPM_VERSION"

# Files of one life of a run. At the next one's start they go to run_<n>/.
COMMAND = "cmd-args.log"
GIT_INFO = "git-info.log"
TASK = "task.json"
ERROR_LOG = "nemo_error_log.txt"
LIGHTNING_LOG = "lightning_logs.txt"
# A file of all its lives.
WANDB_ID = "wandb_id.txt"

# Separators and ".." would leave the experiment's directory; braces are the placeholders of checkpoint file names.
_NOT_IN_A_NAME = re.compile(r"[/\\{}\x00-\x1f]")
_RANK_LOG = re.compile(r"nemo_log_globalrank-\d+_localrank-\d+\.txt")


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run, as every rank knows it. All paths are absolute.

    Attributes:
        exp_dir: The base directory: ``log_dir`` as it was given, or ``./nemo_experiments``.
        log_dir: The run's own directory, ``exp_dir / name / version``.
        name: The experiment's name; empty if the run was given an ``explicit_log_dir``.
        version: What tells this run from others of its name; None if nothing does, empty with an ``explicit_log_dir``.

    Example:
        >>> run = RunDirectory(Path("/base"), Path("/base/mnist/v1"), "mnist", "v1")
        >>> run.checkpoint_dir.as_posix()
        '/base/mnist/v1/checkpoints'
    """

    exp_dir: Path
    log_dir: Path
    name: str
    version: str | None

    @property
    def checkpoint_dir(self) -> Path:
        """Where the run's checkpoints are, unless the checkpoint callback has a ``dirpath`` of its own."""
        return self.log_dir / names.CHECKPOINTS

    def tracker_dir(self, save_dir: str | Path, homes: Iterable[str | Path]) -> Path:
        """Where a tracker that was told to write to ``save_dir`` writes in this run.

        Args:
            save_dir: The tracker's own setting. A relative one goes below ``exp_dir``.
            homes: Directories that people mean by "here", the working directory for one: an absolute ``save_dir``
                inside one of them counts as relative to it. Any other absolute one is a deliberate choice and is kept.
        """
        if not os.path.isabs(save_dir):
            return Path(os.path.normpath(self.exp_dir / save_dir))
        if Path(save_dir).is_relative_to(self.exp_dir):
            return Path(save_dir)
        inside = [home for home in map(Path, homes) if Path(save_dir).is_relative_to(home)]
        if not inside:
            return Path(save_dir)
        return self.exp_dir / Path(save_dir).relative_to(max(inside, key=lambda home: len(home.parts)))


@dataclass(frozen=True)
class Version:
    """A run's version, and whether it is merely the time of day.

    Attributes:
        text: The version, None if the run has none.
        dated: It was read off the clock: another process, or the next start of this one, would get another.
        numbered: It is the first free one of ``version_0``, ``version_1``, …, which whoever creates the directory knows.
    """

    text: str | None
    dated: bool = False
    numbered: bool = False


def choose_version(
    given: str | None,
    *,
    environment: Mapping[str, str],
    resume_if_exists: bool,
    use_datetime_version: bool,
    now: datetime,
    number_versions: bool = False,
) -> Version:
    """The version of a run: given, else ``NEMO_EXPM_VERSION``, else none to resume into, else the time, else none.

    Raises:
        ConfigurationError: The version cannot be the name of a directory.

    Example:
        >>> choose_version("v2", environment={}, resume_if_exists=True, use_datetime_version=True, now=datetime.now()).text
        'v2'
    """
    if given:
        return Version(check_name(given, "version"))
    if environment.get(VERSION_VARIABLE):
        return Version(check_name(environment[VERSION_VARIABLE], f"the environment variable {VERSION_VARIABLE}"))
    if use_datetime_version and not resume_if_exists:
        return Version(now.strftime("%Y-%m-%d_%H-%M-%S"), dated=True)
    if number_versions and not resume_if_exists:
        return Version(None, numbered=True)
    return Version(None)


def next_version(names: Iterable[str]) -> str:
    """The ``version_<n>`` after those among ``names``.

    Example:
        >>> next_version(["version_0", "version_10", "version_x", "notes"])
        'version_11'
    """
    numbers = [int(name.removeprefix("version_")) for name in names if re.fullmatch(r"version_\d+", name)]
    return f"version_{max(numbers, default=-1) + 1}"


def run_directory(name: str, version: str | None, *, log_dir: str | Path | None, here: Path) -> RunDirectory:
    """The directory of version ``version`` of ``name``, below ``log_dir`` or ``here / "nemo_experiments"``."""
    base = absolute(names.EXPERIMENTS if log_dir is None else log_dir, here)
    return RunDirectory(base, base / name / (version or ""), name, version)


def explicit_directory(directory: str | Path, *, here: Path) -> RunDirectory:
    """``directory`` itself as the run's directory, without name and version."""
    base = absolute(directory, here)
    return RunDirectory(base, base, "", "")


def absolute(path: str | Path, here: Path) -> Path:
    """``path`` seen from ``here``, with ``~`` and ``..`` resolved in its text alone: links keep their names."""
    return Path(os.path.normpath(here / Path(path).expanduser()))


def rank_log(global_rank: int, local_rank: int) -> str:
    """Name of the log file of one rank."""
    return f"nemo_log_globalrank-{global_rank}_localrank-{local_rank}.txt"


def is_log_file(name: str) -> bool:
    """Whether a file of this name in a run directory belongs to one life of the run."""
    return name in {COMMAND, GIT_INFO, TASK, ERROR_LOG, LIGHTNING_LOG} or bool(_RANK_LOG.fullmatch(name))


def earlier_life(number: int) -> str:
    """Name of the directory that the log files of the run's ``number``-th life moved to."""
    return f"run_{number}"


def check_name(value: object, what: str) -> str:
    """Return ``value`` if it can be the name of one directory.

    Raises:
        ConfigurationError: It cannot; the message calls it ``what``.
    """
    if not isinstance(value, str):
        raise ConfigurationError(f"{what} must be a string, found {value!r} ({type(value).__name__}).")
    if not value.strip() or value in {".", ".."} or _NOT_IN_A_NAME.search(value):
        raise ConfigurationError(
            f"{what}={value!r} cannot be the name of a directory: expected one path component that is not empty, '.' "
            "or '..', without '/', '\\', braces or control characters. To choose where runs are written, set log_dir; "
            "for one directory of your own making, explicit_log_dir."
        )
    return value


def check_local(path: str | Path | None, what: str) -> None:
    """Refuse what is no local directory.

    Raises:
        ConfigurationError: ``path`` is no path, or an address such as ``s3://bucket/runs``.
    """
    if path is not None and not isinstance(path, str | os.PathLike):
        raise ConfigurationError(f"{what} is {kind_of(path)}: expected a path")
    if path is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
        raise ConfigurationError(
            f"{what}={str(path)!r} is an address; the run directory, where log files are appended to, must be on a "
            f"mounted file system. Give a local {what}, and the address as dirpath of the ModelCheckpoint."
        )
