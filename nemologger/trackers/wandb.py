"""Weights & Biases: its place in the run directory, and one run id for all lives of a run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from nemologger import lightning_port, run_dir
from nemologger.disk import Disk, LocalDisk
from nemologger.run_dir import RunDirectory


def run_id(directory: Path, loggers: Sequence[WandbLogger], *, disk: Disk | None = None) -> str:
    """The W&B run id of the run in ``directory``, kept in its ``wandb_id.txt``. For rank 0.

    One that a logger or ``WANDB_RUN_ID`` gives wins over the one in the file; a run that has neither gets a new one.
    """
    disk = disk or LocalDisk()
    file = directory / run_dir.WANDB_ID
    kept = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    given = next((i for i in map(_given_id, loggers) if i), None) or os.environ.get("WANDB_RUN_ID")
    chosen = given or kept or secrets.token_hex(4)
    if chosen != kept:
        disk.write(file, [f"{chosen}\n".encode()])
        disk.sync(directory)
    return chosen


def move(logger: WandbLogger, run: RunDirectory, homes: Iterable[str | Path], run_id: str, *, directory: bool) -> None:
    """Let ``logger`` continue the run ``run_id``, unless it was given another id.

    Args:
        logger: Not open yet.
        run: The run.
        homes: As for :meth:`~nemologger.run_dir.RunDirectory.tracker_dir`.
        run_id: From :func:`run_id`.
        directory: Also let it write below ``exp_dir / save_dir``.
    """
    save_dir = Path(logger.save_dir or ".")
    if directory:
        save_dir = run.tracker_dir(save_dir, homes)
    # W&B writes to a temporary directory if this one is not there.
    save_dir.mkdir(parents=True, exist_ok=True)
    lightning_port.move_wandb(logger, save_dir, _given_id(logger) or run_id)


def _given_id(logger: WandbLogger) -> str | None:
    if lightning_port.is_open(logger):
        return logger.version if isinstance(logger.version, str) else None
    return lightning_port.wandb_run_id(logger)
