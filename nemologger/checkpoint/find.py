"""Which checkpoint to go on from: what lies in a directory, and the newest that can be trusted (contract C3).

Looking changes nothing on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.weights import read_common
from nemologger.disk.there import exists, is_dir, is_symlink
from nemologger.errors import CheckpointError, DamagedCheckpointError, NemologgerError, UnfinishedCheckpointError
from nemologger.stores.path import in_store, is_unknown

_AT_ONCE = 16

#: The key of ``common.pt`` that only checkpoints of ours have.
OURS = "nemologger"


class Status(Enum):
    """What a directory that looks like a checkpoint is."""

    COMPLETE = "complete"
    DAMAGED = "damaged"
    UNFINISHED = "unfinished"
    FOREIGN = "not ours"


@dataclass(frozen=True)
class Found:
    """One entry of a directory of checkpoints.

    Attributes:
        path: Where it is.
        status: What it is.
        why: What is wrong with it, if something is.
        manifest: Its manifest, if complete.
        mtime: When it was last changed; only used for checkpoints that have no manifest.
    """

    path: Path
    status: Status
    why: str = ""
    manifest: Manifest | None = None
    mtime: float = 0.0

    @property
    def is_last(self) -> bool:
        """Whether its name says that it is what to resume from."""
        name = self.path.name.removesuffix(".ckpt")
        return name.endswith(names.LAST) or name == names.LAST[1:]

    @property
    def is_end(self) -> bool:
        """Whether its name says that its run has completed."""
        return self.path.name.removesuffix(".ckpt").endswith(names.END)


def survey(directory: Path) -> list[Found]:
    """Every checkpoint in ``directory``, by name; also the damaged and unfinished ones."""
    if in_store(directory) is None:
        paths = sorted(directory.iterdir()) if is_dir(directory) else []
        return [found for path in paths if (found := _look_at(path)) is not None]
    paths = sorted(directory.iterdir())  # a store lists nothing where there is nothing
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="nemologger-find") as pool:  # it is all waiting for answers
        return [found for found in pool.map(_look_in_store, paths) if found is not None]


def _look_in_store(path: Path) -> Found | None:
    """As :func:`_look_at`; of a complete one, of which there are many, by a single request."""
    with suppress(DamagedCheckpointError):
        if not _is_beside(path):
            return Found(path, Status.COMPLETE, manifest=manifests.read(path))
    return _look_at(path)


def _look_at(path: Path) -> Found | None:
    try:
        return inspect(path) if _looks_like_one(path) else None
    except PermissionError as error:
        if is_unknown(path, error):
            raise
        if path.name == "lost+found":  # every disk has one
            return None
        return Found(path, Status.DAMAGED, f"it cannot be read: {error.strerror}")


def survey_below(directory: Path) -> list[Found]:
    """What NeMo 1 would go on from in ``directory``, where :func:`survey` finds nothing.

    Files in directories below: Lightning takes a slash in a name, of the metric ``val/loss`` or of the experiment, for a
    directory. And directories that hold distributed weights themselves, rather than in ``weights/``.
    """
    files = [path for pattern in ("*/*.ckpt", "*/*/*.ckpt") for path in directory.glob(pattern)]
    flat = [path.parent for path in directory.glob(f"*/{names.COMMON}")]
    return [inspect(path) for path in sorted([*filter(_looks_like_one, files), *flat])]


def inspect(path: Path) -> Found:
    """What the checkpoint at ``path`` is, by its manifest; its files are not read."""
    if exists(path / names.MANIFEST):
        try:
            return Found(path, Status.COMPLETE, manifest=manifests.read(path))
        except DamagedCheckpointError as error:
            return Found(path, Status.DAMAGED, str(error))
    for mark in (names.marker(path), names.marker(path.with_name(path.name.removesuffix(".ckpt")))):
        if exists(mark):  # NeMo marks a file X.ckpt with X-unfinished
            return Found(path, Status.UNFINISHED, f"{mark.name} is beside it")
    if is_symlink(path) and not exists(path):
        return Found(path, Status.DAMAGED, f"a link to {path.readlink()}, which is not there")
    if is_dir(path) and _is_ours(path):
        return Found(path, Status.DAMAGED, f"it has no {names.MANIFEST}")
    missing = _missing_of(path)
    if missing and any((path / names.WEIGHTS).glob("*")):
        return Found(path, Status.DAMAGED, missing)
    # NeMo takes any directory; whoever chooses prefers one that can be loaded.
    return Found(path, Status.FOREIGN, missing, mtime=path.stat().st_mtime)


def _missing_of(path: Path) -> str:
    """What a directory of NeMo needs, and this one has not; nothing of what is none."""
    if not (is_dir(path / names.WEIGHTS) or is_dir(path / names.CONTEXT)):
        return ""
    needed = (f"{names.WEIGHTS}/{part}" for part in (names.DCP_METADATA, names.COMMON))
    return next((f"it has no {part}" for part in needed if not exists(path / part)), "")


def settled(path: Path) -> Path:
    """``path``, or the name that this checkpoint has got back since it was found.

    A run that starts cleans up after the one before: what was set aside for a successor that never came is renamed back
    (:func:`nemologger.checkpoint.commit.tidy`), perhaps after somebody has chosen to go on from it.
    """
    home = path.with_name(path.name.removesuffix(names.REPLACED))
    return home if home != path and exists(home) and not exists(path) else path


def newest(
    found: Iterable[Found],
    faults: Callable[[Path], list[str]],
    report: Callable[[str], None],
    suitable: Callable[[Found], str | None] = lambda found: None,
) -> Found | None:
    """The newest checkpoint that is whole.

    Args:
        found: What :func:`survey` saw.
        faults: What is wrong with the files of a complete checkpoint; empty if nothing.
        report: Called with a line for every newer checkpoint that is passed over.
        suitable: Why a whole checkpoint still cannot be used, or None.

    Returns:
        It, or None if there is nothing that looks like a checkpoint.

    Raises:
        UnfinishedCheckpointError: If there are only unfinished ones.
        CheckpointError: If there are some, and none can be used; a DamagedCheckpointError if one is damaged.
    """
    found = list(found)
    passed_over: list[str] = []

    def pass_over(one: Found, why: str) -> None:
        passed_over.append(f"{one.path.name}: {why}")
        report(f"checkpoint {one.path} is passed over: {why}")

    for one in found:
        if one.status in (Status.DAMAGED, Status.UNFINISHED):
            pass_over(one, f"{one.status.value}, {one.why}")
    for one in sorted((f for f in found if f.status is Status.COMPLETE), key=_newest_last, reverse=True):
        wrong = faults(one.path)
        if wrong:
            pass_over(one, f"damaged, {'; '.join(wrong)}")
        elif reason := suitable(one):
            pass_over(one, reason)
        else:
            return one
    foreign = [one for one in found if one.status is Status.FOREIGN]
    if foreign:
        loadable = [one for one in foreign if not one.why] or foreign
        for one in foreign:
            if one not in loadable:
                pass_over(one, one.why)
        last = [one for one in loadable if one.is_last] or loadable
        return max(last, key=lambda one: one.mtime)
    if found:
        raise _none_is_whole(found, passed_over)
    return None


def _none_is_whole(found: list[Found], passed_over: list[str]) -> CheckpointError:
    """What is wrong where there are some, and what to do."""
    directory, listing = found[0].path.parent, "\n  ".join(passed_over)
    if all(one.status is Status.UNFINISHED for one in found):
        return UnfinishedCheckpointError(
            f"{directory} holds only unfinished checkpoints; there is nothing to resume from:\n  {listing}\n"
            "Remove the directory to start over, or name another checkpoint with resume_from_path."
        )
    damaged = any(one.status is Status.DAMAGED for one in found) or any(": damaged" in line for line in passed_over)
    return (DamagedCheckpointError if damaged else CheckpointError)(
        f"none of the checkpoints in {directory} can be used:\n  {listing}\n"
        "Restore one from a backup, name another with resume_from_path, or remove the directory to start over."
    )


def _newest_last(found: Found) -> tuple[tuple[int, int, int, float], bool, bool]:
    """By age; then what stands by itself. Whoever reads by way of a link follows it for each file: in a store, a request."""
    if found.manifest is None:
        return (0, 0, 0, 0.0), False, found.is_last
    return found.manifest.order, found.manifest.name == found.path.name, found.is_last


def _is_beside(path: Path) -> bool:
    """Whether its name says that it lies beside checkpoints."""
    return path.name.startswith(".") or path.name.endswith(names.UNFINISHED)


def _looks_like_one(path: Path) -> bool:
    if _is_beside(path):
        return False
    if is_symlink(path) and not exists(path):
        return True
    if is_dir(path):
        return any(exists(path / part) for part in (names.WEIGHTS, names.MANIFEST, names.CONTEXT)) or (
            exists(names.marker(path))
        )
    # NeMo 1 writes averaged weights beside a checkpoint X.ckpt: nothing to go on from.
    return path.suffix == ".ckpt" and not path.name.endswith("-EMA.ckpt")


def _is_ours(path: Path) -> bool:
    try:
        return OURS in read_common(path / names.WEIGHTS)
    except NemologgerError:
        return False
