"""Which checkpoint is meant: one that was named, the newest of a directory, or where a new run takes its weights from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from nemologger import names
from nemologger.checkpoint.find import Found, Status, inspect, newest, survey, survey_below
from nemologger.disk.there import exists, is_dir, is_symlink
from nemologger.errors import (
    CheckpointError,
    DamagedCheckpointError,
    NotFoundError,
    RunCompletedError,
    UnfinishedCheckpointError,
)

log = logging.getLogger("nemologger.resume")

Faults = Callable[[Path], list[str]]

_SHOWN = 5


def named(path: Path, faults: Faults) -> Found:
    """The one checkpoint that was asked for.

    Raises:
        NotFoundError: If it is not there.
        DamagedCheckpointError: If it is damaged.
        UnfinishedCheckpointError: If it was never finished.
    """
    if path.name == names.WEIGHTS and exists(path.parent / names.MANIFEST):
        path = path.parent
    if not exists(path) and not is_symlink(path):
        raise NotFoundError(f"there is no checkpoint at {path}{_as_far_as_there(path)}")
    found = inspect(path)
    if found.status is Status.UNFINISHED:
        raise UnfinishedCheckpointError(f"{path} was never finished, or was being removed: {found.why}")
    if found.status is Status.COMPLETE and (wrong := faults(path)):
        found = Found(path, Status.DAMAGED, "; ".join(wrong))
    if found.status is Status.DAMAGED:
        raise DamagedCheckpointError(f"{path} is damaged and was not loaded: {found.why}")
    if is_dir(path) and found.status is Status.FOREIGN and not _holds_weights(path):
        _explain_wrong_directory(path)
        inside = _listed(path, ". In it there are")
        raise NotFoundError(f"{path} is not a checkpoint: it has no {names.WEIGHTS}/{inside}")
    return _warn_if_foreign(found) or found


def newest_in(
    directory: Path,
    faults: Faults,
    suitable: Callable[[Found], str | None],
    *,
    past_end: bool,
    is_named: bool,
) -> Found | None:
    """The newest complete checkpoint in ``directory``, or None.

    Args:
        directory: Of one run's checkpoints.
        faults: What is wrong with the files of a checkpoint.
        suitable: Why a complete one cannot be used all the same; None if it can.
        past_end: Take one that says that its run has completed.
        is_named: Somebody has named this directory, who should hear if it is one of runs rather than of checkpoints.

    Raises:
        RunCompletedError: If the run has completed, and going on was not asked for.
        NotFoundError: If ``directory`` holds runs.
        CheckpointError: If it holds what cannot be read here.
        DamagedCheckpointError: If there are checkpoints, but none that can be trusted.
        UnfinishedCheckpointError: If there are only unfinished ones.
    """
    if is_named and _holds_weights(directory):
        return named(directory, faults)
    found = survey(directory)
    if not found:
        _refuse_model_parallel(directory)
        if is_named:
            _explain_wrong_directory(directory)
        found = survey_below(directory)
    ends = [one for one in found if one.is_end and one.status in (Status.COMPLETE, Status.FOREIGN)]
    if ends and not past_end:
        raise RunCompletedError(
            f"{ends[0].path} says that this run has completed. Pass resume_past_end=True to train on from it, or use "
            "another run directory."
        )
    return _warn_if_foreign(newest(ends or found, faults, log.error, suitable))


def start_of(path: Path, faults: Faults) -> Path:
    """The checkpoint that ``RestoreConfig.path`` means."""
    path = path.expanduser().absolute()
    for directory in (path / names.CHECKPOINTS, path):
        if not _holds_weights(directory) and survey(directory):
            found = newest(survey(directory), faults, log.error)
            if found is not None:
                return found.path
    return named(path, faults).path


def warn_of_newer(asked: Found, directory: Path | None) -> None:
    """A run that is told by name where to begin leaves what it has saved since behind: as every restart would."""
    own = [] if directory is None else survey(directory)
    saved = [(one.manifest.order, one) for one in own if one.status is Status.COMPLETE and one.manifest is not None]
    if not saved:
        return
    order, latest = max(saved, key=lambda pair: pair[0])
    if asked.manifest is not None and asked.manifest.order[:-1] == order[:-1]:
        return  # it is that one; by its path one cannot tell, which may go through a link
    log.warning(
        "AutoResume(resume_from_path=...) begins at %s, as every start with it does, although this run has got to %s. To go "
        "on from there, start without resume_from_path, with resume_if_exists=True.",
        asked.path,
        latest.path,
    )


def _holds_weights(path: Path) -> bool:
    return any(exists(weights / names.DCP_METADATA) for weights in (path, path / names.WEIGHTS))


def _warn_if_foreign(found: Found | None) -> Found | None:
    if found is not None and found.status is Status.FOREIGN:
        log.warning("%s has no manifest (NeMo or Lightning wrote it): it cannot be verified", found.path)
    return found


def _refuse_model_parallel(directory: Path) -> None:
    """A directory with the checkpoints of NeMo 1's model parallelism is not an empty one.

    Raises:
        CheckpointError: If there are such checkpoints.
    """
    parts = [path for pattern in ("mp_rank_*", "tp_rank_*") for path in directory.glob(f"{pattern}/*.ckpt")]
    if parts:
        raise CheckpointError(
            f"{directory} holds checkpoints of a model that NeMo 1 split over ranks ({parts[0].relative_to(directory)}), "
            "which nothing here can put together. Convert one with NeMo, and name the file with resume_from_path."
        )


def _explain_wrong_directory(directory: Path) -> None:
    """Tell somebody who named a directory of runs where its checkpoints are.

    Raises:
        NotFoundError: If ``directory`` holds runs or versions rather than checkpoints.
    """
    below = [d for pattern in ("", "*/", "*/*/") for d in directory.glob(f"{pattern}{names.CHECKPOINTS}") if survey(d)]
    if below:
        listing = "\n  ".join(str(path) for path in below[:_SHOWN])
        raise NotFoundError(f"{directory} holds runs, not checkpoints. The checkpoints are in:\n  {listing}")


def _as_far_as_there(path: Path) -> str:
    """What there is beside ``path``, or how far it is right, as the end of a sentence."""
    if beside := _listed(path.parent, ". Beside it there are"):
        return beside
    there = next((parent for parent in path.parents if exists(parent)), None)
    return "" if there is None else f": {there} is there, without {path.relative_to(there).parts[0]!r}"


def _listed(directory: Path, begin: str) -> str:
    """``begin``, and the first checkpoints of ``directory``; nothing if it has none."""
    found = [one.path.name for one in survey(directory)]
    more = ", ..." if len(found) > _SHOWN else ""
    return f"{begin}: {', '.join(found[:_SHOWN])}{more}" if found else ""
