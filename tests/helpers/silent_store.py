"""Three ranks, of which rank 0, whose the store is, answers nobody any more: ``silent_store.py DIRECTORY``.

The others write what they are told into ``DIRECTORY/rank<RANK>.json``. Rank 0 is stopped, which is to them what a host
without power is: no connection is closed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from nemologger.errors import SilentRankError
from nemologger.ranks import ProcessGroup, notes

TIMEOUT = 5.0


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    notes._ANSWER = TIMEOUT
    dist.init_process_group("gloo")
    ranks = ProcessGroup(timedelta(seconds=TIMEOUT))
    ranks.gather("all are here")
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    told = ""
    try:
        ranks.gather("rank 0 is not")
    except SilentRankError as error:
        told = str(error)
    partial = directory / f"rank{ranks.rank}.partial"
    partial.write_text(json.dumps({"told": told, "missing": ranks.missing_at("the end", TIMEOUT)}))
    partial.rename(directory / f"rank{ranks.rank}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
