"""Which combination of a sweep this process works on. It travels in the environment, to the ranks of a run too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemologger.disk import LocalDisk
from nemologger.disk.there import exists
from nemologger.errors import ConfigurationError

VARIABLE = "NEMOLOGGER_SWEEP_JOB"
_CLAIM = "sweep_job.json"
_POSTPONED = "postponed.txt"


@dataclass(frozen=True)
class SweepJob:
    """One combination of a sweep.

    Attributes:
        name: What tells it from the other combinations, the same at each start of the sweep: ``model.lr=0.1,seed=1``. A
            run that is given no version gets this one.
        number: Its place in this start of the sweep, from 0.
        overrides: The overrides that make it, as Hydra has them.
        directory: Where the sweep keeps its record of it.
    """

    name: str
    number: int
    overrides: tuple[str, ...]
    directory: Path

    def dumps(self) -> str:
        """As the environment carries it."""
        body = {"name": self.name, "number": self.number, "overrides": self.overrides, "directory": str(self.directory)}
        return json.dumps(body)

    @staticmethod
    def loads(text: str) -> SweepJob:
        """Read what :meth:`dumps` wrote.

        Raises:
            ConfigurationError: It is something else.
        """
        try:
            body = json.loads(text)
            return SweepJob(body["name"], body["number"], tuple(body["overrides"]), Path(body["directory"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"the environment variable {VARIABLE} is {text!r}: it is set by a sweep for the processes it starts, and "
                "by nobody else. Unset it."
            ) from error

    def postpone(self, reason: str) -> None:
        """Say that training stopped before its end, so that the next start of the sweep goes on with it.

        For a run that returns as usual, but has more to do, because its time is over for example. One that raises or is
        killed is not finished anyway.
        """
        LocalDisk().write(self.directory / _POSTPONED, [reason.encode()])

    def begin(self) -> None:
        """Forget an earlier :meth:`postpone`."""
        LocalDisk().remove(self.directory / _POSTPONED)

    def postponed(self) -> str | None:
        """The reason given to :meth:`postpone`, None without one."""
        path = self.directory / _POSTPONED
        return path.read_text() if exists(path) else None

    def claim(self, run_directory: Path) -> None:
        """Note in ``run_directory`` whose it is.

        Raises:
            ConfigurationError: It is another combination's, which would lose its checkpoints to this one.
        """
        path = run_directory / _CLAIM
        text = json.dumps({"name": self.name, "overrides": self.overrides}, indent=1)
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            owner = _name_in(path)
            if owner not in (None, self.name):
                raise ConfigurationError(
                    f"{run_directory} is the run directory of the combination {owner}, and {self.name} of the same sweep "
                    "was given it too. Leave version and explicit_log_dir unset: each combination then gets its own name "
                    "as version. Or make nemologger.sweep_job().name, in YAML ${sweep_job:}, a part of them."
                ) from None


def _name_in(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["name"])
    except (ValueError, KeyError, TypeError):
        return None  # cut short by a crash, while its owner was writing it


def sweep_job(environment: Mapping[str, str] | None = None) -> SweepJob | None:
    """The combination that this process works on, None outside of a sweep of :func:`nemologger.hydra_runner`.

    Args:
        environment: Where to look, by default the process's environment.

    Raises:
        ConfigurationError: The environment was tampered with.

    Example:
        >>> job = sweep_job()
        >>> job.name if job else "not in a sweep"
        'not in a sweep'
    """
    text = (os.environ if environment is None else environment).get(VARIABLE)
    return None if not text else SweepJob.loads(text)
