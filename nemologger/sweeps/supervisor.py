"""What a sweep does with one combination: skip it, or run it in a process of its own and see how it ends."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemologger.combination import VARIABLE, SweepJob
from nemologger.disk.there import exists
from nemologger.errors import ConfigurationError, SweepError
from nemologger.run.directory import VERSION_VARIABLE
from nemologger.sweeps import child, devices, launchers, record
from nemologger.sweeps.naming import NOT_IDENTITY, job_name
from nemologger.sweeps.program import Program
from nemologger.sweeps.record import Record, State

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_TAIL = 4000  # characters of a combination's output that its error shows


@dataclass(frozen=True)
class Supervisor:
    """Deals with one combination after the other; it travels to the launcher's workers, the user's function does not.

    Attributes:
        program: What is started for each.
        launch: Which start of the sweep this is.
        swept: Keys that differ between the combinations.
        process: The one that started the sweep.
    """

    program: Program
    launch: str
    swept: tuple[str, ...]
    process: int

    def run(self, cfg: DictConfig, hydra: HydraConf) -> Any:
        """Run the combination ``cfg``, unless it is finished, with the very same configuration.

        Returns:
            What the job function returned, as far as JSON can hold it; None if it failed and Hydra's own sweeper, which
            would not go on with the next, is not to know.

        Raises:
            ConfigurationError: The sweep itself was started as one of several ranks.
            SweepError: It failed, and the sweeper is one that has its own way with that.
        """
        _refuse_ranks(os.environ)
        try:
            self._check_parent(hydra)
            return self._deal_with(cfg, hydra)
        finally:
            self._check_parent(hydra)

    def _check_parent(self, hydra: HydraConf) -> None:
        """End a worker whose sweep was killed: nobody takes what it answers, and it would wait for more for minutes."""
        if self._parent(hydra) not in (None, os.getppid()):
            log.error("the process that started the sweep is gone: nothing new is started")
            os._exit(1)

    def _deal_with(self, cfg: DictConfig, hydra: HydraConf) -> Any:
        job = self._job(hydra)
        planned = Record(job.name, job.overrides, plain_config(cfg), State.RUNNING, self.launch)
        earlier = record.read(job.directory)
        if earlier is not None and earlier.state is State.FINISHED:
            changes = record.changes(earlier.config, planned.config)
            if not changes:
                log.info("%s: finished on %s, skipped", job.name, earlier.time)
                if is_recorder(os.environ):
                    record.write(job.directory, replace(earlier, launch=self.launch))
                return earlier.value
            log.info("%s: finished with another configuration, so it runs again (%s)", job.name, "; ".join(changes))
        return self._run(job, planned, cfg, hydra)

    def _parent(self, hydra: HydraConf) -> int | None:
        """The process that started the sweep, if this one is a worker of it and has no work without it."""
        is_worker = launchers.shares_this_machine(hydra.launcher._target_) and os.getpid() != self.process
        return self.process if is_worker else None

    def _job(self, hydra: HydraConf) -> SweepJob:
        swept = {*self.swept, *(hydra.sweeper.get("params") or {})}
        excluded = [*NOT_IDENTITY, *hydra.job.config.override_dirname.exclude_keys]
        name = job_name(hydra.overrides.task, swept=swept, excluded=excluded)
        return SweepJob(name, hydra.job.num, tuple(hydra.overrides.task), record.place(hydra) / name)

    def _run(self, job: SweepJob, planned: Record, cfg: DictConfig, hydra: HydraConf) -> Any:
        if is_recorder(os.environ):
            record.write(job.directory, planned)
        here = os.getpid() == self.process
        alone = hydra.launcher._target_ == launchers.BASIC or (hydra.launcher._target_ == launchers.NEMO and here)
        output = None if alone else job.directory / record.OUTPUT
        log.info("%s: starts%s", job.name, "" if output is None else f", prints to {output}")
        slot = _slot(cfg, hydra)
        try:
            code = child.run(
                self.program.arguments(hydra),
                _environment(os.environ, job, slot),
                directory=self.program.directory,
                output=output,
                parent=self._parent(hydra),
            )
        finally:
            if slot is not None:
                slot.release()
        if not is_recorder(os.environ):
            return None
        ended = record.read(job.directory)
        if ended is None or ended.state is State.RUNNING:
            ended = planned.now(State.FAILED, trace=_how_it_ended(code, output))
            record.write(job.directory, ended)
        return self._outcome(ended, code, hydra)

    def _outcome(self, ended: Record, code: int, hydra: HydraConf) -> Any:
        if ended.state is not State.FAILED:
            if code:
                log.warning("%s: %s, but then its process ended %s", ended.name, ended.state.value, _code(code))
            log.info("%s: %s", ended.name, ended.state.value)
            return ended.value
        log.error("%s failed: %s", ended.name, ended.trace.rstrip().rsplit("\n", 1)[-1])
        if hydra.sweeper._target_ == _BASIC_SWEEPER:
            return None  # reported together, when all have run
        raise SweepError(f"{ended.name} failed:\n{ended.trace}")


def plain_config(cfg: DictConfig) -> Any:
    """``cfg`` as plain values, for the record; interpolations stay as they were written."""
    from omegaconf import OmegaConf

    return record.plain(OmegaConf.to_container(cfg, resolve=False, enum_to_str=True))


def is_recorder(environment: Mapping[str, str]) -> bool:
    """Whether this process keeps the record: of the tasks that Slurm starts for one combination the first does."""
    return environment.get("SLURM_PROCID", "0") == "0"


def _refuse_ranks(environment: Mapping[str, str]) -> None:
    found = [name for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK") if name in environment]
    if found:
        raise ConfigurationError(
            f"this sweep was started as one of several ranks ({found[0]} is set), and each of them would run every "
            "combination. Start it with python script.py -m; each combination then starts its own ranks, as "
            "Trainer(devices=...) says."
        )


def _environment(environment: Mapping[str, str], job: SweepJob, slot: devices.Slot | None) -> dict[str, str]:
    version = "-".join(filter(None, [environment.get(VERSION_VARIABLE), job.name]))
    ours = {VARIABLE: job.dumps(), VERSION_VARIABLE: version}
    if slot is not None:
        ours[devices.VISIBLE] = ",".join(slot.devices)
    return {"PYTHONFAULTHANDLER": "1", **environment, **ours}


def _slot(cfg: DictConfig, hydra: HydraConf) -> devices.Slot | None:
    """A share of this machine's GPUs, if others run beside this one and nobody has shared them out."""
    if not launchers.shares_this_machine(hydra.launcher._target_) or devices.VISIBLE in hydra.job.env_set:
        return None
    room = launchers.places(cfg, hydra.launcher, devices.visible(os.environ))
    if not room.groups:
        return None
    return devices.take(record.place(hydra) / ".devices", room.groups, room.per_group)


def _how_it_ended(code: int, output: Path | None) -> str:
    text = f"its process ended {_code(code)} before the job function returned"
    if code == 0:
        return text + ": does the script call the decorated function when it is run?"
    if output is None or not exists(output):
        return text + "; what it printed is above"
    return f"{text}; the end of {output}:\n{output.read_text(errors='replace')[-_TAIL:]}"


def _code(code: int) -> str:
    return f"with code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


def swept_keys(arguments: Collection[str]) -> tuple[str, ...]:
    """The keys among a command line's overrides that have several values.

    Example:
        >>> swept_keys(["-m", "model.lr=0.1,0.01", "seed=1", "width=range(1,4)"])
        ('model.lr', 'width')
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    found = []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            continue  # an option, or its value; Hydra says so if it should have been an override
        if override.is_sweep_override():
            found.append(override.key_or_group)
    return tuple(found)
