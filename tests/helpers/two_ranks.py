"""Two real processes over gloo: what each of them saw, as plain values.

Run as a script it is one of the ranks: ``python two_ranks.py RANK DIRECTORY``. :func:`results` starts both, once per test
run, and returns what they wrote.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from processes import seen_by_ranks, wait_for
from torch import distributed as dist

from helpers.disks import FailingDisk
from helpers.engine import newest_in, save, snapshot_of
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import LocalDisk
from nemologger.errors import ConfigurationError
from nemologger.ranks import Poll, ProcessGroup, connect, decide, together
from nemologger.saving import checks
from nemologger.saving.checks import check_shared

WORLD = 2
SILENCE = 4.0  # seconds that a rank waits for another


@lru_cache(maxsize=1)
def results(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Start both ranks below ``directory`` and wait for them; what rank 0 and rank 1 saw."""
    zero, one = seen_by_ranks(Path(__file__), WORLD, directory)
    return zero, one


def model_state(rank: int) -> dict[str, Any]:
    """A model that data-parallel ranks share, with a buffer that they do not, and Adam's state of it."""
    generator = torch.Generator().manual_seed(7)
    weights = {f"w{i}": torch.randn(40, 30, generator=generator) for i in range(5)}
    moments = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(40, 30, generator=generator)} for i in range(len(weights))
    }
    return {
        "global_step": 3,
        "state_dict": {**weights, "running_mean": torch.full((30,), float(rank))},
        "optimizer_states": [{"state": moments, "param_groups": [{"params": list(moments)}]}],
    }


def model_snapshot(rank: int, **changes: torch.Tensor) -> Any:
    state = model_state(rank)
    state["state_dict"].update(changes)
    names = frozenset(name for name in state["state_dict"] if name.startswith("w"))
    return take(state, names, [{i: f"w{i}" for i in range(5)}])


def outcome(step: Callable[[], Any]) -> dict[str, Any]:
    """What ``step`` returned or raised, and how long it took."""
    started = time.monotonic()
    try:
        return {"value": step(), "seconds": time.monotonic() - started}
    except Exception as error:  # noqa: BLE001  it is what is told
        return {
            "error": type(error).__name__,
            "message": str(error),
            "cause": type(error.__cause__).__name__,
            "seconds": time.monotonic() - started,
        }


def fail(error: Exception) -> Any:
    raise error


class SeesLate(LocalDisk):
    """Of a host that remembers that there was no directory ``late``, as one of NFS may, until it is to make it."""

    def make_directory(self, path: Path) -> None:
        path.symlink_to(path.with_name("late"))


def _scenarios(rank: int, directory: Path) -> dict[str, Callable[[], Any]]:
    ranks = connect(timedelta(seconds=60))
    disk = LocalDisk()

    def written(name: str, snapshot: Any, on: LocalDisk = disk) -> str:
        Saver(on, ranks).save(snapshot, directory / "run" / name, Manifest(step=3, epoch=0))
        return "saved"

    def newest() -> int:
        return decide(ranks, lambda: newest_in(directory / "run").manifest.step)

    def first() -> str:
        save(directory / "run" / "first", 1, ranks=ranks)
        return "saved"

    def buffers() -> str:
        saver = Saver(disk, ranks)
        for size in (5, 2000):
            own = {"only": torch.ones(size)} if rank else {}
            mine = model_snapshot(rank, running_mean=torch.full((size * (1 + 3 * rank),), float(rank)), **own)
            saver.save(mine, directory / "buffers" / str(size), Manifest(step=3, epoch=0))
        return "saved"

    def sees(own: str) -> None:
        checks._UNTIL_SEEN = 0.5
        place = directory / own
        place.mkdir(exist_ok=True)
        check_shared(ranks, disk, place)

    def sees_late() -> None:
        checks._UNTIL_SEEN = 0.5
        place = directory / "late"
        place.mkdir(exist_ok=True)
        check_shared(ranks, SeesLate() if rank else disk, place.with_name("late-seen") if rank else place)

    every = Poll(ranks, seconds=0)
    full = FailingDisk(0, only=("write",), forever=True) if rank == 1 else disk
    return {
        "decide": lambda: decide(ranks, lambda: os.getpid()),
        "decide ours": lambda: decide(ranks, lambda: fail(ConfigurationError("not like this"))),
        "decide other": lambda: decide(ranks, lambda: fail(KeyError("x"))),
        "decide unpicklable": lambda: decide(ranks, threading.Lock) and "no error",
        "exchange": lambda: ranks.exchange(rank, lambda values: fail(KeyError("x"))),
        "exchange unpicklable": lambda: ranks.exchange(rank, lambda values: threading.Lock()) and "no error",
        "together": lambda: together(ranks, lambda: rank * 10),
        "together ours": lambda: together(ranks, lambda: fail(ConfigurationError("bad")) if rank == 1 else 0),
        "together other": lambda: together(ranks, lambda: fail(OSError(28, "full")) if rank == 1 else 0),
        "together all": lambda: together(ranks, lambda: fail(ValueError(f"mine is {rank}"))),
        "together unpicklable": lambda: len(together(ranks, lambda: threading.Lock() if rank == 1 else 0)),
        "still together": lambda: together(ranks, lambda: "here"),
        "largest": lambda: ranks.largest([rank, 10.5 - rank]),
        "polls": lambda: [every(rank == 1 and call == 2) for call in range(4)],
        "a shared directory": lambda: sees("shared"),
        "a directory seen late": sees_late,
        "a directory each": lambda: sees(f"of rank {rank}"),
        "first": first,
        "full disk": lambda: written("full", model_snapshot(rank), full),
        "full disk on rank 0": lambda: written(
            "full0", model_snapshot(rank), FailingDisk(9, forever=True) if rank == 0 else disk
        ),
        "newest after a full disk": newest,
        "other names": lambda: written("names", model_snapshot(rank, **({"wx": torch.ones(3)} if rank else {}))),
        "other shapes": lambda: written("shapes", model_snapshot(rank, w0=torch.ones(3 + rank, 2))),
        "other dtypes": lambda: written(
            "dtypes", model_snapshot(rank, w0=torch.ones(3, dtype=[torch.int32, torch.float32][rank]))
        ),
        "newest after differences": newest,
        "model": lambda: written("model", model_snapshot(rank)),
        "buffers": buffers,
        "scalars": lambda: written("scalars", snapshot_of(3)),
        "newest": newest,
    }


def _silence(rank: int, directory: Path) -> dict[str, Callable[[], Any]]:
    """A rank that is late, and one that dies; groups of their own, for they are of no use afterwards."""
    slow = ProcessGroup(timedelta(seconds=SILENCE))
    mute = ProcessGroup(timedelta(seconds=SILENCE))
    dead = ProcessGroup(timedelta(seconds=SILENCE))

    def when_it_is_over(name: str, step: Callable[[], Any]) -> Any:
        """Rank 1 takes part when rank 0 has given up."""
        over = directory / f"over-{name}"
        if rank == 1:
            wait_for(over.exists)
        try:
            return step()
        finally:
            over.touch()

    def late() -> Any:
        return when_it_is_over("late", lambda: together(slow, lambda: rank))

    def unheard() -> Any:
        return when_it_is_over("unheard", lambda: mute.largest([rank]))

    def died() -> Any:
        return "gone" if rank == 1 else decide(dead, lambda: together(dead, lambda: 0))

    return {"late": late, "late again": lambda: together(slow, lambda: rank), "unheard": unheard, "died": died}


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    seen = {name: outcome(step) for name, step in _scenarios(rank, directory).items()}
    seen |= {name: outcome(step) for name, step in _silence(rank, directory).items()}
    partial = directory / f"rank{rank}.partial"
    partial.write_text(json.dumps(seen))
    partial.rename(directory / f"rank{rank}.json")
    os._exit(0)  # one of them plays dead: there is nobody to say goodbye to


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
