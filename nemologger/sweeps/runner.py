"""The decorator that makes a script's main function a Hydra application, for one run or a sweep."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemologger.combination import SweepJob, sweep_job
from nemologger.disk.lock import DirectoryLock
from nemologger.errors import ConfigurationError, DirectoryInUseError
from nemologger.resolvers import register_resolvers
from nemologger.sweeps import child, launch, record
from nemologger.sweeps.launchers import NotStarted
from nemologger.sweeps.program import Program
from nemologger.sweeps.record import Record, State
from nemologger.sweeps.supervisor import Supervisor, is_recorder, plain_config, swept_keys

if TYPE_CHECKING:
    from omegaconf import DictConfig

JobFunction = Callable[["DictConfig"], Any]

_VERSION_BASE = "1.3"  # of Hydra's behaviour: the working directory stays
_PATIENCE = 90.0  # seconds for the process of a sweep that was killed to notice, save and go


def hydra_runner(
    config_path: str | None = ".", config_name: str | None = None, schema: Any = None
) -> Callable[[JobFunction], Callable[..., Any]]:
    """Let Hydra make the configuration of the decorated ``main(cfg)`` from YAML files and the command line.

    As NeMo's, with Hydra's options (``--config-path``, ``--config-name``, ``--config-dir``, ``--cfg``, ``--help``, …). A run
    stays in the working directory, and Hydra writes nothing: no output directory, ``.hydra`` or log file, unless the
    configuration (``hydra.run.dir``, ``hydra.output_subdir``) or the command line asks for them.

    **Sweeps.** ``python script.py -m model.lr=0.1,0.01 seed=1,2`` runs each of the four combinations as a run of its own, in
    a process of its own, also with several devices:

    - Each has a name made of its overrides, ``model.lr=0.1,seed=1``. A ``NeMoLogger`` that is given no version takes it as
      version. :func:`nemologger.sweep_job` tells it to the script, ``${sweep_job:}`` to the configuration. What only says
      where and how long to run (``exp_manager.*``, ``trainer.max_steps``, …, and Hydra's ``exclude_keys``) is not in it.
    - One that raises, or is killed, does not stop the others. At the end all that failed are raised, with their traces.
    - The same command again skips those that are finished, and starts the others, which resume as any run does
      (``AutoResume(resume_if_exists=True, ...)``). A combination is finished when ``main`` has returned for it and its
      training was not merely stopped for now; it runs again if its configuration has changed since. The records are in
      ``hydra.sweep.dir``, by default ``nemo_experiments/sweeps/<script>/<config>``: remove one to have it run again. A
      ``hydra.sweep.dir`` that is the working directory itself (``"."``, as in files of NeMo 1) means that default, too.
    - One after the other by default. ``hydra/launcher=joblib hydra.launcher.n_jobs=8`` runs eight at a time; if the machine
      has four GPUs, two share one (``cfg.trainer.devices`` says how many a combination gets; without it one).
      ``hydra/launcher=submitit_slurm`` makes each a Slurm job.
    - NeMo 1's ``hydra/launcher: nemo_launcher`` uses ``hydra.launcher.num_gpus`` GPUs of the machine, by default -1: all of
      them, and runs ``jobs_per_gpu`` combinations on each at a time; without a GPU that many on the CPU. More than one at
      a time are joblib's. A combination has one GPU, or ``cfg.trainer.devices``.

    Args:
        config_path: The directory of the YAML files, relative to the script.
        config_name: The main file, without ``.yaml``.
        schema: A dataclass with the configuration's keys, types and defaults; the YAML file must agree with it, and may be
            missing.

    Returns:
        A decorator. What it makes is called without arguments by a script, or with a configuration, which it then passes on.

    Raises:
        ConfigurationError: An argument is no text, Hydra is not installed, or ``--config-name`` is a path although there
            is a schema. Raised by the decorated function: ``hydra.launcher`` asks for what is not there.
        SweepError: Raised by the decorated function: combinations of a sweep have failed.

    Example:
        >>> @hydra_runner(config_path="conf", config_name="train")
        ... def main(cfg):
        ...     return cfg["seed"]
        >>> main({"seed": 1})  # in a script: if __name__ == "__main__": main()
        1
    """

    for name, value in (("config_path", config_path), ("config_name", config_name)):
        if not isinstance(value, (str, type(None))):
            raise ConfigurationError(
                f"hydra_runner({name}={value!r}): expected text. It is called before it decorates: "
                '@hydra_runner(config_path="conf", config_name="train")'
            )

    def decorate(function: JobFunction) -> Callable[..., Any]:
        @functools.wraps(function)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return function(cfg)
            return _main(function, config_path, config_name, schema)

        return main

    return decorate


def _main(function: JobFunction, config_path: str | None, config_name: str | None, schema: Any) -> None:
    try:
        import hydra
    except ImportError as error:
        raise ConfigurationError("hydra_runner needs Hydra: pip install 'nemologger[hydra]'") from error
    register_resolvers()
    job = sweep_job()
    application = hydra.main(version_base=_VERSION_BASE, config_path=config_path, config_name=config_name)
    is_job = child.hold_lifeline(os.environ)
    with _schema(schema, config_name):
        if is_job and job is not None:
            with launch.hydra_defaults(None):
                application(_Job(function, job) if is_recorder(os.environ) else function)()
            return
        name = uuid.uuid4().hex
        with tempfile.TemporaryDirectory(prefix="nemologger-") as directory:
            note = Path(directory, "sweep.json")
            try:
                with launch.hydra_defaults(note):
                    application(_Start(function, name))()
            except NotStarted as stop:
                raise stop.error from None
            launch.report(note, name)


class _Start:
    """What Hydra calls for a run that somebody started, and for each combination of a sweep."""

    def __init__(self, function: JobFunction, launch: str) -> None:
        self.__wrapped__ = function  # Hydra looks there for the script
        self._supervisor = Supervisor(Program.of_this_process(), launch, swept_keys(sys.argv[1:]), os.getpid())

    def __call__(self, cfg: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra = HydraConfig.get()
        if hydra.mode is RunMode.MULTIRUN:
            return self._supervisor.run(cfg, hydra)
        return self.__wrapped__(cfg)

    def __getstate__(self) -> dict[str, Any]:
        # A worker only supervises: it needs neither the function nor what the script imports.
        return {"_supervisor": self._supervisor}


class _Job:
    """What Hydra calls in the process of one combination: the job function, and a record of how it ended."""

    def __init__(self, function: JobFunction, job: SweepJob) -> None:
        self.__wrapped__ = function
        self._job = job

    def __call__(self, cfg: DictConfig) -> Any:
        job = self._job
        with _only_one(job.directory):
            job.begin()
            planned = record.read(job.directory)
            started = "" if planned is None else planned.launch
            mine = Record(job.name, job.overrides, plain_config(cfg), State.RUNNING, started)
            try:
                value = self.__wrapped__(cfg)
            except BaseException as error:
                stopped = isinstance(error, SystemExit) and not error.code
                state = State.POSTPONED if stopped else State.FAILED
                record.write(job.directory, mine.now(state, trace=_trace(error)))
                raise
            reason = job.postponed()
            state = State.FINISHED if reason is None else State.POSTPONED
            record.write(job.directory, mine.now(state, value=record.plain(value), trace=reason or ""))
        return value


def _trace(error: BaseException) -> str:
    inner = error.__traceback__.tb_next if error.__traceback__ is not None else None
    return "".join(traceback.format_exception(type(error), error, inner))


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """No two processes for one combination. That of an earlier start, which was killed, may still be on its way out."""
    lock = DirectoryLock(directory)
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            lock.take()
            break
        except DirectoryInUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _schema(schema: Any, config_name: str | None) -> Iterator[None]:
    """Have Hydra hold the main file against ``schema``, which takes its name in Hydra's store."""
    if schema is None:
        yield
        return
    from hydra.core.config_store import ConfigStore

    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--config-name", "-cn")
    given = options.parse_known_args()[0].config_name
    if given is not None and os.path.dirname(given):
        raise ConfigurationError(
            f"--config-name {given}: with a schema it must be a name without a directory; give the directory as "
            f"--config-path, and --config-name {os.path.basename(given)}"
        )
    name = given or config_name
    if name is None:
        raise ConfigurationError("hydra_runner(schema=...) needs the name of the configuration: give config_name too")
    warnings.filterwarnings("ignore", message=r"\s*'.*' is validated against ConfigStore schema with the same name")
    repo = ConfigStore.instance().repo
    before = dict(repo)
    ConfigStore.instance().store(name=os.path.splitext(name)[0], node=schema, provider="nemologger")
    try:
        yield
    finally:
        repo.clear()
        repo.update(before)
