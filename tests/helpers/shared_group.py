"""Two ranks that connect again and again: ``shared_group.py RANK DIRECTORY``. What each of them saw, as JSON."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from nemologger.errors import SilentRankError
from nemologger.ranks import connect

WORLD = 2
LONG = timedelta(seconds=60)
SHORT = timedelta(seconds=5)


def held() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def silent(rank: int, directory: Path) -> dict[str, Any]:
    """A rank that is late, seen by two who share a group, and by one who connects afterwards."""
    first, second = connect(SHORT), connect(SHORT)
    if rank == 1:
        wait_for(directory / "told-0")
    told = []
    for ask in (lambda: first.largest([rank]), lambda: second.gather(rank)):
        try:
            ask()
        except SilentRankError as error:
            told.append(str(error))
    (directory / f"told-{rank}").touch()
    missing = second.missing_at("exception", 30)
    wait_for(directory / f"told-{1 - rank}")
    after, patient = connect(SHORT).gather(rank), connect(LONG)
    if rank == 1:
        time.sleep(SHORT.total_seconds() + 0.5)
    return {"told": told, "missing": missing, "after": after, "patient": patient.largest([rank])}


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for life in ("first", "second"):
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/store-{life}", rank=rank, world_size=WORLD, timeout=LONG
        )
        before = held()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 2, most))  # gloo takes more
        several = [connect(LONG)]
        one = held()
        several += [connect(LONG * (1 + number % 2)) for number in range(5)]
        seen[life] = {"first group": one - before, "five more": held() - one}
        seen[life]["gathered"] = [ranks.gather(rank) for ranks in several]
        # Whoever comes to a point of the first has not come to that of the second.
        seen[life]["missing"] = [
            several[0].missing_at("exception", 30),
            several[1].missing_at("exception", 0.2) if rank == 0 else None,
        ]
        several[0].gather(rank)
        if life == "second":
            seen["silent"] = silent(rank, directory)
        dist.barrier()
        del several
        dist.destroy_process_group()
        gc.collect()
        seen[life]["left"] = held()
    (directory / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
