"""Weights & Biases: its place in the run directory, and one run id for all lives of a run."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import WandbLogger

from nemologger import lightning_port
from nemologger.disk import LocalDisk
from nemologger.disk.there import is_dir, is_file
from nemologger.run.directory import WANDB_ID, RunDirectory
from nemologger.saving.kept_checkpoints import KeptCheckpoints
from nemologger.trackers import wandb_file
from nemologger.trackers.tracker import Logged, Uploaded

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint

log = logging.getLogger(__name__)

_STEP = "trainer/global_step"  # Lightning's name for the step in W&B


#: The ids that loggers of this process were given: W&B's current run is the process's, too.
_OF_RUNS: set[str] = set()


def run_id(directory: Path, loggers: Sequence[WandbLogger]) -> str:
    """The W&B run id of the run in ``directory``, kept in its ``wandb_id.txt``. For rank 0.

    One that a logger or ``WANDB_RUN_ID`` gives wins over the one in the file; a run that has neither gets a new one.
    """
    file = directory / WANDB_ID
    kept = file.read_text(encoding="utf-8").strip() if is_file(file) else ""
    given = next((i for i in map(_given_id, loggers) if i), None) or os.environ.get("WANDB_RUN_ID")
    chosen = given or kept or secrets.token_hex(4)
    if chosen != kept:
        disk = LocalDisk()
        disk.write(file, [f"{chosen}\n".encode()])
        disk.sync(directory)
    return chosen


def move(logger: WandbLogger, run: RunDirectory, homes: Iterable[str | Path], run_id: str, *, directory: bool) -> None:
    """Let ``logger`` continue the run ``run_id``, unless it was given another id.

    Args:
        logger: Not open yet.
        run: The run.
        homes: As for :meth:`~nemologger.run.directory.RunDirectory.tracker_dir`.
        run_id: From :func:`run_id`.
        directory: Also let it write below ``exp_dir / save_dir``.
    """
    save_dir = Path(logger.save_dir or ".")
    if directory:
        save_dir = run.tracker_dir(save_dir, homes)
    # W&B writes to a temporary directory if this one is not there.
    save_dir.mkdir(parents=True, exist_ok=True)
    run_id = _given_id(logger) or run_id
    lightning_port.move_wandb(logger, save_dir, run_id)
    _finish_other(run_id)
    _OF_RUNS.add(run_id)


def _finish_other(run_id: str) -> None:
    """End the W&B run of an earlier run of this process: Lightning's logger takes whichever there is for its own."""
    wandb = sys.modules.get("wandb")
    running = None if wandb is None else wandb.run
    if wandb is not None and running is not None and running.id in _OF_RUNS and running.id != run_id:
        log.info("W&B run %s is finished: %s begins in this process", running.id, run_id)
        wandb.finish()


def log_directories(logger: WandbLogger) -> None:
    """Let ``logger``'s ``log_model`` hold for checkpoints that are directories, too: Lightning passes them over."""
    known = Uploaded(type(logger).__name__)
    lightning_port.log_wandb_checkpoints_by(logger, partial(_log_checkpoints, logger, known))


def _log_checkpoints(logger: WandbLogger, known: Uploaded, checkpoint: ModelCheckpoint) -> None:
    """Log each new checkpoint as a version of the model's artifact, as Lightning does with files."""
    import wandb

    if isinstance(checkpoint, KeptCheckpoints):
        checkpoint.finish_removals()  # none of them changes while it is read
    lightning_port.log_wandb_files(logger, checkpoint)
    title = lightning_port.wandb_artifact(logger) or f"model-{logger.experiment.id}"
    best = checkpoint.best_model_path
    for path in known.new(checkpoint):
        if is_dir(path):
            scores = {Path(of).resolve(): float(score) for of, score in checkpoint.best_k_models.items()}
            about = {"original_filename": path.name, "score": scores.get(path), "monitor": checkpoint.monitor}
            artifact = wandb.Artifact(title, type="model", metadata={**about, "mode": checkpoint.mode})
            artifact.add_dir(str(path), policy=logger.add_file_policy)
            is_best = bool(best) and Path(best).resolve() == path
            logger.experiment.log_artifact(artifact, aliases=["latest", "best"] if is_best else ["latest"])
            known.add(path)


def _given_id(logger: WandbLogger) -> str | None:
    if lightning_port.is_open(logger):
        return logger.version if isinstance(logger.version, str) else None
    return lightning_port.wandb_run_id(logger)


def leave_out_logged(logger: WandbLogger) -> None:
    """Let ``logger`` leave out, from now on, what an earlier life has logged at a step already. On rank 0.

    W&B cannot take back what was logged. What was, stands in the files that it keeps of each life below ``save_dir``.
    """
    run = logger.experiment
    steps: dict[str, set[int]] = {}
    last = -1
    for file in sorted(Path(logger.save_dir or ".", "wandb").glob(f"*run-*-{run.id}/run-{run.id}.wandb")):
        if file.parent == Path(run.dir).parent:
            continue
        for row in wandb_file.history(file):
            last = max(last, int(row.get("_step", -1)))
            for key in row:
                steps.setdefault(key, set()).add(row.get(_STEP, -1))
    if run.step <= last and run.offline:
        run.log({}, step=last + 1)  # its own count of rows goes on, so that W&B can sync the lives one after the other
    logged = Logged(lambda name: steps.get(name, ()))
    log_metrics = logger.log_metrics

    def log_rest(metrics: Mapping[str, float], step: int | None = None) -> None:
        rest = logged.rest(metrics, step, lambda key: lightning_port.wandb_metric(logger, key))
        if rest:
            log_metrics(rest, step)

    logger.log_metrics = log_rest  # type: ignore[method-assign]


def log_all(logger: WandbLogger) -> None:
    """Undo :func:`leave_out_logged`."""
    logger.__dict__.pop("log_metrics", None)
