"""The script that a sweep runs, and the command that runs one of its combinations."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemologger.errors import ConfigurationError

if TYPE_CHECKING:
    from hydra.conf import HydraConf

# What is about the sweep, not about a job of it.
_OF_THE_SWEEP = ("hydra.mode", "hydra.sweep", "hydra/sweep", "hydra.launcher", "hydra/launcher", "hydra.run.dir")


@dataclass(frozen=True)
class Program:
    """How this process was started, without its overrides.

    Attributes:
        command: Interpreter and script, or interpreter, ``-m`` and module.
        directory: Where it was started: relative paths mean the same in every combination.
    """

    command: tuple[str, ...]
    directory: str

    @staticmethod
    def of_this_process() -> Program:
        """This process's; to be asked before anything changes the working directory."""
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is not None:  # python -m package.module
            return Program((sys.executable, "-m", spec.name.removesuffix(".__main__")), os.getcwd())
        return Program((sys.executable, os.path.abspath(sys.argv[0])), os.getcwd())

    def arguments(self, hydra: HydraConf) -> list[str]:
        """The command that runs the job of ``hydra`` alone, as anybody could type it.

        Raises:
            ConfigurationError: This is no script that could be started again.
        """
        script = self.command[-1]
        if "-m" not in self.command and not os.path.isfile(script):
            raise ConfigurationError(
                f"a sweep starts its script once for each combination, and {script!r} is no file: put what is decorated "
                "with hydra_runner into a script, and run it with python script.py or python -m module"
            )
        options: list[str] = []
        for source in hydra.runtime.config_sources:
            if source.provider == "main":
                options += ["--config-path", _location(source)]
            elif source.provider == "command-line":
                options += ["--config-dir", source.path]
        if hydra.job.config_name is not None:
            options += ["--config-name", hydra.job.config_name]
        kept = [override for override in hydra.overrides.hydra if not override.lstrip("+~").startswith(_OF_THE_SWEEP)]
        job = [
            "hydra.mode=RUN",
            f"hydra.run.dir={quoted(hydra.runtime.output_dir)}",
            f"++hydra.job.num={hydra.job.num}",
            f"++hydra.job.id={quoted(str(hydra.job.id))}",
        ]
        return [
            *self.command,
            *options,
            *_without(kept, ("hydra.job.num", "hydra.job.id")),
            *job,
            *hydra.overrides.task,
        ]


def quoted(text: str) -> str:
    """``text`` as Hydra's override grammar takes it literally."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _location(source: Any) -> str:
    return source.path if source.schema == "file" else f"{source.schema}://{source.path}"


def _without(overrides: Iterable[str], keys: Sequence[str]) -> list[str]:
    return [override for override in overrides if override.lstrip("+").split("=", 1)[0] not in keys]
