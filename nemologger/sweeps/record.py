"""What is known of a combination: a small file in the sweep's directory, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemologger import names
from nemologger.disk import LocalDisk

if TYPE_CHECKING:
    from hydra.conf import HydraConf

FILE = "job.json"
OUTPUT = "output.log"
SWEEPS = "sweeps"


class State(StrEnum):
    """How far a combination got."""

    RUNNING = "running"  # or its process was killed: nobody was left to say so
    FINISHED = "finished"  # the job function returned
    POSTPONED = "postponed"  # it returned, but the run has more to do
    FAILED = "failed"


@dataclass(frozen=True)
class Record:
    """One combination, as the last start of the sweep left it.

    Attributes:
        name: The combination's.
        overrides: What makes it.
        config: All it was configured with, as plain values; interpolations as they were written.
        state: How far it got.
        launch: Which start of the sweep dealt with it last.
        value: What the job function returned, as far as JSON can hold it.
        trace: Why it failed, or was postponed.
        time: When it got there.
    """

    name: str
    overrides: tuple[str, ...]
    config: Any
    state: State
    launch: str
    value: Any = None
    trace: str = ""
    time: str = ""

    def now(self, state: State, *, value: Any = None, trace: str = "") -> Record:
        """The same combination, further on."""
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        return replace(self, state=state, value=value, trace=trace, time=time)


def place(hydra: HydraConf) -> Path:
    """The directory of a sweep's records: ``hydra.sweep.dir``.

    Where that is the working directory itself, as in NeMo 1's examples, a directory per combination would lie there beside
    everything else: then it is the one that a sweep has by default.
    """
    working, directory = Path(hydra.runtime.cwd), Path(hydra.runtime.cwd, hydra.sweep.dir)
    if directory.resolve() != working.resolve():
        return directory
    return working / names.EXPERIMENTS / SWEEPS / str(hydra.job.name) / str(hydra.job.config_name)


def read(directory: Path) -> Record | None:
    """The record in ``directory``, None if there is none that can be read: the combination then runs again."""
    try:
        body = json.loads((directory / FILE).read_text())
        return Record(**{**body, "overrides": tuple(body["overrides"]), "state": State(body["state"])})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write(directory: Path, record: Record) -> None:
    """Put ``record`` in ``directory``, durably, in the place of the earlier one."""
    disk = LocalDisk()
    disk.make_directory(directory)
    disk.write(directory / FILE, [json.dumps(asdict(record), indent=1, default=_plain).encode()])
    disk.sync(directory)


def of_launch(sweep: Path, launch: str) -> list[Record]:
    """What one start of the sweep in the directory ``sweep`` left, by name."""
    records = [read(path.parent) for path in sorted(sweep.glob(f"*/{FILE}"))]
    return [record for record in records if record is not None and record.launch == launch]


def plain(values: Any) -> Any:
    """``values`` as a file would give them back: tuples are lists, what JSON does not know is a number or text."""
    return json.loads(json.dumps(values, default=_plain))


def changes(before: Any, after: Any) -> list[str]:
    """What differs between two configurations.

    Example:
        >>> changes({"trainer": {"max_steps": 5}, "seed": 1}, {"trainer": {"max_steps": 9}, "seed": 1})
        ['trainer.max_steps: 5 -> 9']
    """
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [f"{k}: {old.get(k, '-')} -> {new.get(k, '-')}" for k in sorted(old | new) if old.get(k) != new.get(k)]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each value by its dotted key, as JSON text: ``nan`` equals itself there."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value)


def _plain(value: Any) -> float | str:
    try:
        return float(value)  # a tensor of one number, or numpy's
    except (TypeError, ValueError, RuntimeError):
        return str(value)
