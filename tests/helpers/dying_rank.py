"""Three ranks, of which one dies while the others wait for it: ``dying_rank.py RANK DIRECTORY``.

Each ends as soon as it knows, rank 0 with the store that they compare notes in.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from nemologger.errors import SilentRankError
from nemologger.ranks.tree import RankTree

WORLD, DIES = 3, 1


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", int(os.environ["PORT"]), WORLD, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    tree = RankTree(dist.new_group(backend="gloo"), 60)
    tree.exchange(rank, len, 60)
    seen = ""
    if rank != DIES:
        try:
            tree.exchange(rank, len, 60)
        except SilentRankError as error:
            seen = str(error)
    (directory / f"rank{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
