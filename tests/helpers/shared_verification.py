"""Two ranks that work for a decision of rank 0, and verify a checkpoint so: ``shared_verification.py RANK DIRECTORY``."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from processes import tell
from torch import distributed as dist

from helpers.engine import save
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint import verify
from nemologger.errors import ConfigurationError, NemologgerError
from nemologger.ranks import ProcessGroup, connect, decide_with_help

WORLD = 2
TIMEOUT = 5.0
DAMAGED = "weights/common.pt"


def outcome(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except NemologgerError as error:
        return f"{type(error).__name__}: {error}"


def working(rank: int, directory: Path) -> dict[str, Any]:
    """What becomes of questions."""
    ranks, brief = connect(timedelta(seconds=60)), ProcessGroup(timedelta(seconds=TIMEOUT))
    seen: dict[str, Any] = {"timeout": TIMEOUT}

    def at_once(question: int) -> Iterator[int]:
        yield 1
        return question + rank

    def slowly(question: int) -> Iterator[int]:
        for left in range(question * (rank + 1), 0, -1):  # rank 1 takes twice as long
            time.sleep(0.5)
            yield left
        return rank

    def failing(question: int) -> Iterator[int]:
        yield question
        if rank == 1:
            raise ConfigurationError("not here")

    def mute(question: int) -> Iterator[int]:
        yield question
        while rank == 1 and not (directory / "told").exists():
            time.sleep(0.05)

    seen["several questions"] = decide_with_help(ranks, lambda ask: [ask(10), ask(20)], at_once)
    begin = time.monotonic()
    seen["slow"] = outcome(lambda: decide_with_help(brief, lambda ask: ask(8), slowly))
    seen["slow, seconds"] = time.monotonic() - begin
    seen["fails"] = outcome(lambda: decide_with_help(ranks, lambda ask: ask(1), failing))
    seen["mute"] = outcome(lambda: decide_with_help(brief, lambda ask: ask(1), mute))
    (directory / "told").touch()
    return seen


def resuming(rank: int, directory: Path) -> dict[str, Any]:
    """A resume of a directory whose newest checkpoint is damaged in a file that rank 1 looks at."""
    import lightning.pytorch as pl

    from nemologger.resume import AutoResume

    checkpoints = directory / "checkpoints"
    ranks = connect(timedelta(seconds=60))
    for step in (1, 2):
        save(checkpoints / f"step={step}", step, ranks=ranks)
    damaged = checkpoints / "step=2" / DAMAGED
    if rank == 0:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    ranks.broadcast(None)
    looked_at: dict[str, list[tuple[str, int]]] = {"step=1": [], "step=2": []}
    look = verify._look

    def noting(checkpoint: Path, unit: Any) -> Any:
        looked_at[checkpoint.name] += [(unit.file, number) for number in unit.blocks]
        return look(checkpoint, unit)

    errors: list[str] = []

    class Errors(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    handler = Errors(logging.ERROR)
    logging.getLogger("nemologger").addHandler(handler)
    verify._look = noting
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), GROUP_RANK="0", LOCAL_WORLD_SIZE=str(WORLD),
        TORCHELASTIC_RUN_ID="none", MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
    )  # fmt: skip
    trainer = pl.Trainer(accelerator="cpu", devices=WORLD, strategy="ddp", max_steps=4, logger=False)
    resumed = AutoResume(resume_from_directory=checkpoints).setup(trainer)
    mine = [name for name, units in looked_at.items() if any(file == DAMAGED for file, _ in units)]
    return {
        "looked at": looked_at,
        "files": {name: sorted(manifests.read(checkpoints / name).files) for name in looked_at},
        "damaged file": mine,
        "resumed": [resumed.path.name, resumed.step],
        "errors": errors,
    }


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=90)
    )
    seen = {**working(rank, directory), **resuming(rank, directory)}
    tell(seen, rank, WORLD, directory)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
