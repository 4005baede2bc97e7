"""Five ranks in a tree of three floors, of which some keep silent: ``five_ranks.py RANK DIRECTORY``."""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from processes import tell, wait_for
from torch import distributed as dist

from nemologger.errors import SilentRankError
from nemologger.ranks import tree as rank_tree
from nemologger.ranks.tree import RankTree
from nemologger.watch.guard_main import waits_for_others

WORLD = 5
TIMEOUT = 6.0
LONG = "x" * 10_000


def outcome(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except SilentRankError as error:
        return str(error)


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    rank_tree.FAN_OUT = 2  # rank 0 above 1 and 2, rank 1 above 3 and 4
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    trees = [RankTree(dist.new_group(backend="gloo"), 30) for _ in range(3)]
    seen: dict[str, Any] = {
        "exchange": outcome(lambda: trees[0].exchange(rank * 10, list, 30)),
        "broadcast": outcome(lambda: trees[0].broadcast("zero's" if rank == 0 else "mine", 30)),
        "long": outcome(lambda: len(trees[0].exchange(LONG, "".join, 30))),
    }
    seen["late"] = [trees[0].missing_at("all", 20), trees[0].missing_at("all", 0)]
    seen["missing"] = trees[0].missing_at("some", TIMEOUT) if rank != 3 else None
    for silent, tree in ((3, trees[1]), (1, trees[2])):
        trees[0].exchange(rank, len, 30)  # all begin together
        told = [directory / f"told-{silent}-{other}" for other in range(WORLD) if other != silent]
        if rank == silent:
            wait_for(lambda told=told: all(one.exists() for one in told))
        else:
            with (directory / f"stacks-{rank}.txt").open("w+") as stacks:
                faulthandler.dump_traceback_later(TIMEOUT / 2, file=stacks)
                seen[f"without {silent}"] = outcome(lambda tree=tree: tree.exchange(rank, list, TIMEOUT))
                stacks.seek(0)
                seen[f"waits for {silent}"] = waits_for_others(stacks.read(), threading.get_ident())
            (directory / f"told-{silent}-{rank}").touch()
    tell(seen, rank, WORLD, directory)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
