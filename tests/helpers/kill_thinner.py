"""Thins a checkpoint in processes that are killed, each at another call of the disk; checks what each kill leaves.

Usage: ``python kill_thinner.py DIRECTORY``. Prints the number of kills.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from helpers.disks import FailingDisk
from helpers.engine import faults, names_in, newest_in, save, step_in
from nemologger.checkpoint import commit
from nemologger.checkpoint.find import survey
from nemologger.checkpoint.keeping.thinning import thin
from nemologger.checkpoint.manifest import read
from nemologger.disk import LocalDisk


class DeadlyDisk(FailingDisk):
    """Its ``at``-th call is the last thing that the process does, in the middle of a file if that is a write."""

    def _call(self, method: str) -> bool:
        if super()._call(method):
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    def write(self, path, parts):
        parts = [bytes(part) for part in parts]
        if self.calls == self.at:  # half of it is there
            path.with_name(f".{path.name}.partial").write_bytes(b"".join(parts)[: len(parts[0]) // 2])
        super().write(path, parts)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    save(directory / "start" / "a", 1, apart=True)
    save(directory / "start" / "b", 2, apart=True)
    kills = 0
    while True:
        run = shutil.copytree(directory / "start", directory / str(kills))
        child = os.fork()
        if child == 0:
            try:
                thin(DeadlyDisk(kills), run / "a")
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        # A reader that comes now, before anybody has cleaned up.
        whole = [one for one in survey(run) if one.manifest is not None]
        assert {one.manifest.step for one in whole} == {1, 2}, (kills, whole)
        assert not any(faults(one.path) for one in whole), kills
        assert newest_in(run).manifest.step == 2, kills
        commit.tidy(LocalDisk(), run)
        assert names_in(run) == {"a", "b"}, (kills, names_in(run))
        has_optimizer = read(run / "a").has_optimizer
        assert step_in(run / "a", thin=not has_optimizer) == 1, kills
        assert faults(run / "a") == [], kills
        if not os.WIFSIGNALED(status):
            assert not has_optimizer
            break
        thin(LocalDisk(), run / "a")
        assert step_in(run / "a", thin=True) == 1, kills
        kills += 1
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
