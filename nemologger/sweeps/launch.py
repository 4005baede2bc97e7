"""One start of a sweep, in the process where somebody started it: Hydra's settings for it, and how it went."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemologger import names
from nemologger.disk.there import exists
from nemologger.errors import SweepError
from nemologger.sweeps import launchers, record
from nemologger.sweeps.record import State

log = logging.getLogger(__name__)

_TARGET = "nemologger.sweeps.note.NoteSweep"
_WHOLE_TRACES = 5


@contextmanager
def hydra_defaults(note: Path | None) -> Iterator[None]:
    """Other defaults for what Hydra writes, below what the user's configuration and command line say.

    A single run gets no directory, no ``.hydra`` and no log file from Hydra; a sweep has one directory, that does not change
    from one start to the next. NeMo 1's launcher is there, under its name.

    Args:
        note: The file for :class:`~nemologger.sweeps.note.NoteSweep`; none is needed in a job of a sweep.
    """
    from hydra.conf import HydraConf
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    before = [(group, key, group.get(key)) for group, key in _entries(store.repo)]
    others = [entry for entry in HydraConf().defaults if not {"output", "job_logging"} & set(entry)]
    settings = HydraConf(
        defaults=[{"output": "nemologger"}, *others, {"job_logging": "stdout"}],
        output_subdir=None,
        callbacks={} if note is None else {"nemologger": {"_target_": _TARGET, "path": str(note)}},
    )
    sweep = f"{names.EXPERIMENTS}/{record.SWEEPS}/${{hydra.job.name}}/${{hydra.job.config_name}}"
    output = {"run": {"dir": "."}, "sweep": {"dir": sweep, "subdir": "."}}
    store.store(group="hydra", name="config", node=settings, provider="nemologger")
    store.store(group="hydra/output", name="nemologger", node=output, package="hydra", provider="nemologger")
    store.store(group="hydra/launcher", name=launchers.NEMO_NAME, node=launchers.NeMoLauncher, provider="nemologger")
    try:
        yield
    finally:
        for group, key, node in before:
            group.pop(key, None)
            if node is not None:
                group[key] = node


def _entries(repo: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """What is changed of Hydra's store. Plugins add their own entries to the same groups when Hydra first looks for them."""
    hydra = repo.setdefault("hydra", {})
    return [
        (hydra, "config.yaml"),
        (hydra.setdefault("output", {}), "nemologger.yaml"),
        (hydra.setdefault("launcher", {}), f"{launchers.NEMO_NAME}.yaml"),
    ]


def report(note: Path, launch: str) -> None:
    """Say how the sweep went; nothing if there was none.

    Raises:
        SweepError: Combinations have failed.
    """
    if not exists(note):
        return
    sweep = Path(json.loads(note.read_text()))
    done = record.of_launch(sweep, launch)
    by_state = {state: [r for r in done if r.state is state] for state in State}
    failed = by_state[State.FAILED]
    count = f"{len(by_state[State.FINISHED])} of {len(done)} combinations are finished"
    for postponed in by_state[State.POSTPONED]:
        log.warning("%s has more to do (%s): start the sweep again", postponed.name, postponed.trace)
    if not failed:
        log.info("%s; their records are in %s", count, sweep)
        return
    traces = [f"--- {r.name} ({' '.join(r.overrides)}) ---\n{r.trace.rstrip()}" for r in failed[:_WHOLE_TRACES]]
    if len(failed) > _WHOLE_TRACES:
        traces.append("--- and " + ", ".join(r.name for r in failed[_WHOLE_TRACES:]) + " ---")
    raise SweepError(
        f"{len(failed)} of {len(done)} combinations failed; {count}. The same command again runs what is left. Records: "
        f"{sweep}\n\n" + "\n\n".join(traces)
    )
