"""Saves in a child process until it is killed, again and again; checks what each kill leaves.

Usage: ``python kill_saver.py DIRECTORY KILLS``. Prints the number of kills and the last step that was saved.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from helpers.engine import newest_in, save
from nemologger.checkpoint import commit
from nemologger.checkpoint.find import Status, survey
from nemologger.disk import LocalDisk


def live(directory: Path, saved: int) -> None:
    """One life: clean up, go on from the newest, save a step after the other, keep two and ``-last``.

    A byte goes to the descriptor ``saved`` for each save.
    """
    disk = LocalDisk()
    commit.tidy(disk, directory)
    found = newest_in(directory)
    step = found.manifest.step if found else 0
    kept = sorted((f for f in survey(directory) if not f.is_last), key=lambda f: f.manifest.order)
    paths = [f.path for f in kept]
    while True:
        step += 1
        path = directory / ("again" if step % 3 == 0 else f"step={step}")
        manifest = save(path, step)
        os.write(saved, b".")
        last = directory / "x-last"
        if step % 2:
            commit.duplicate(disk, path, last, manifest)
        else:
            commit.point(disk, path, last)
        paths = [p for p in paths if p != path] + [path]
        while len(paths) > 2:
            commit.retract(disk, paths.pop(0))


def main(directory: Path, kills: int) -> None:
    torch.set_num_threads(1)
    dice = random.Random(0)
    save(directory / "step=1", 1)
    newest = 1
    for life in range(kills):
        heard, saved = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                live(directory, saved)
            finally:
                os._exit(1)  # only an error comes here
        os.close(saved)
        if life % 2:  # every other life gets somewhere, however busy the machine; the rest may die at once
            for _ in range(2):
                os.read(heard, 1)
        time.sleep(0.005 + dice.random() * 0.06)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(heard)
        assert os.WIFSIGNALED(status), "a life ended by itself"
        found = newest_in(directory)
        assert found is not None
        assert found.status is Status.COMPLETE, found
        assert found.manifest.step >= newest, (found.manifest.step, newest)
        newest = found.manifest.step
    print(kills, newest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
