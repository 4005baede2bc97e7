"""Published, or absent: the order of operations that makes a checkpoint appear and disappear as a whole (contract C1).

To publish: marker, files, directories synced, ``manifest.json``, marker away. The manifest is the commit: whoever finds a
valid one finds everything it lists. To remove, the same backwards: marker, manifest away, the rest, marker away. The
marker is for NeMo, which knows no manifest and skips what has one.

An object store has no rename, so nothing is set aside there: a name that a complete checkpoint has is not written to
(:func:`nemologger.checkpoint.keeping.shelf.claim` finds another), and the manifest is created only if there is none.

Rank 0 alone calls these.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import Manifest
from nemologger.disk import Disk, lock
from nemologger.disk.there import exists, is_dir, is_file, is_symlink
from nemologger.errors import DamagedCheckpointError, DirectoryInUseError
from nemologger.stores import owner
from nemologger.stores.path import in_store

log = logging.getLogger(__name__)

_NO_MANIFEST = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def begin(disk: Disk, checkpoint: Path, directories: Sequence[str] = (names.WEIGHTS,)) -> None:
    """Make room for ``checkpoint``. What is there under that name stays as it is, under another one.

    Args:
        disk: Where.
        checkpoint: The directory.
        directories: Those in it that files will be written to.

    Raises:
        OSError: If that failed; a FileExistsError if what is there must not be replaced.
        DirectoryInUseError: Another run has the directory now.
    """
    _check_ours(checkpoint)
    if disk.can_rename:
        _make_durable(disk, checkpoint.parent)
        aside = _set_aside(checkpoint)
        published = is_published(checkpoint)
        strange = exists(checkpoint) and not exists(names.marker(checkpoint))
        if strange and not published:
            _refuse_what_is_no_checkpoint(checkpoint)
        if published or (strange and not os.path.lexists(aside)):
            _make_way(disk, aside)
            disk.rename(checkpoint, aside)
    elif holds_a_checkpoint(checkpoint):
        raise FileExistsError(errno.EEXIST, "a complete checkpoint has this name", str(checkpoint))
    _mark(disk, checkpoint)
    disk.remove(checkpoint)
    if disk.can_rename:
        for directory in directories:
            disk.make_directory(checkpoint / directory)


def publish(disk: Disk, checkpoint: Path, manifest: Manifest) -> None:
    """Make ``checkpoint`` one: all files that ``manifest`` lists are written and synced, this makes them count."""
    if disk.can_rename:
        if not exists(names.marker(checkpoint)):  # its disk has gone, and what is written since lies below the mount
            raise FileNotFoundError(errno.ENOENT, "what was begun there is gone", str(checkpoint))
        for directory in _directories(checkpoint):
            disk.sync(directory)
        disk.sync(checkpoint.parent)
    else:
        disk.sync(checkpoint)
        _check_there(checkpoint, manifest)
    _check_ours(checkpoint)  # hours may have passed since begin(), on a host that stood still
    disk.commit(checkpoint / names.MANIFEST, manifest.dumps())
    try:
        disk.sync(checkpoint)
    except OSError:
        disk.remove(checkpoint / names.MANIFEST)
        raise
    # From here on it counts, and what is left over does no harm.
    try:
        disk.remove(names.marker(checkpoint))
        if disk.can_rename:
            retract(disk, _set_aside(checkpoint))
        disk.sync(checkpoint.parent)
    except OSError as error:
        log.warning("checkpoint %s is complete, but cleaning up beside it failed: %s", checkpoint, error)


def abandon(disk: Disk, checkpoint: Path) -> None:
    """Undo a :func:`begin` whose save failed."""
    if taken_over_by(checkpoint.parent):  # what is there now is another run's
        return
    if is_published(checkpoint):  # it failed before it touched the earlier one
        disk.remove(names.marker(checkpoint))
        return
    if exists(names.marker(checkpoint)):
        disk.remove(checkpoint)
        disk.sync(checkpoint.parent)
        disk.remove(names.marker(checkpoint))
        disk.sync(checkpoint.parent)
    if disk.can_rename:
        _put_back(disk, checkpoint)


def retract(disk: Disk, checkpoint: Path) -> None:
    """Remove ``checkpoint``: a directory of ours, a link, or a file. Nothing to do if it is not there."""
    if unpublish(disk, checkpoint):
        clear(disk, checkpoint)


def unpublish(disk: Disk, checkpoint: Path) -> bool:
    """The first half of :func:`retract`, which takes no time: from here on ``checkpoint`` does not count.

    Returns:
        Whether there is something left for :func:`clear`.
    """
    if not exists(checkpoint) and not is_symlink(checkpoint):
        return False
    if is_symlink(checkpoint) or not is_dir(checkpoint):
        disk.remove(checkpoint)
        disk.sync(checkpoint.parent)
        return False
    _mark(disk, checkpoint)
    disk.remove(checkpoint / names.MANIFEST)
    disk.sync(checkpoint)
    return True


def clear(disk: Disk, checkpoint: Path) -> None:
    """The second half of :func:`retract`: give back the space of what was unpublished."""
    disk.remove(checkpoint)
    disk.sync(checkpoint.parent)
    disk.remove(names.marker(checkpoint))
    disk.sync(checkpoint.parent)


def duplicate(disk: Disk, checkpoint: Path, copy: Path, manifest: Manifest) -> None:
    """Publish ``copy``, which stands by itself but shares the bytes of ``checkpoint`` where hard links exist."""
    try:
        begin(disk, copy)
        for directory in sorted({(copy / file).parent for file in manifest.files}):
            disk.make_directory(directory)
        for file in manifest.files:
            disk.link(checkpoint / file, copy / file)
        publish(disk, copy, replace(manifest, name=copy.name, last=True, ranked=False))
    except OSError:
        with contextlib.suppress(OSError):
            abandon(disk, copy)
        raise


def supersede(disk: Disk, checkpoint: Path, fresh: Path, manifest: Manifest) -> None:
    """Publish ``fresh``, a hidden directory whose files are written, in place of ``checkpoint``, which is complete.

    That keeps its name until all of ``fresh`` is durable, and is complete under another one between two renames.
    """
    for directory in _directories(fresh):
        disk.sync(directory)
    disk.sync(checkpoint.parent)
    disk.commit(fresh / names.MANIFEST, manifest.dumps())
    disk.sync(fresh)
    aside = _set_aside(checkpoint)
    _make_way(disk, aside)
    disk.rename(checkpoint, aside)
    try:
        disk.rename(fresh, checkpoint)
        disk.sync(checkpoint.parent)
    except OSError:
        with contextlib.suppress(OSError):  # the disk that failed may fail again; the next run tidies up
            _put_back(disk, checkpoint)
        raise
    try:
        retract(disk, aside)
    except OSError as error:
        log.warning("checkpoint %s is complete, but cleaning up beside it failed: %s", checkpoint, error)


def point(disk: Disk, checkpoint: Path, link: Path) -> None:
    """Make ``link`` a relative symbolic link to ``checkpoint`` beside it.

    Raises:
        OSError: If that failed; a FileExistsError if what is there must not be replaced.
    """
    if not is_symlink(link) and exists(link):
        _refuse_what_is_no_checkpoint(link)
        retract(disk, link)
    disk.symlink(link, checkpoint.name)
    disk.sync(link.parent)


def tidy(disk: Disk, directory: Path) -> list[str]:
    """Clean up after dead runs: what they were writing or removing when they died. Never what is complete.

    Call it only from the run that owns ``directory``, never from a reader.

    Returns:
        A line for each thing that was done.
    """
    done: list[str] = []
    remote = in_store(directory)
    if remote is not None:  # no marker tells of those that a rank began when the others had given up
        done += [
            f"an upload of {file} was never finished: dropped"
            for file in remote.store.drop_uploads(str(remote), _is_of_checkpoint)
        ]
    elif not is_dir(directory):
        return done
    there = sorted(directory.iterdir())
    for mark in (path for path in there if path.name.endswith(names.UNFINISHED)):
        if is_file(mark) and not mark.stat().st_size:  # else somebody's text
            done += _settle(disk, mark, _settle_marked)
    if disk.can_rename:  # else nothing was set aside, and nothing hidden
        for aside in sorted(directory.glob(f"*{names.REPLACED}")):
            done += _settle(disk, aside, _settle_aside)
        for partial in sorted(directory.glob(".*.partial")):
            done += _settle(disk, partial, _settle_partial)
    if done:
        disk.sync(directory)
    return done


def is_published(checkpoint: Path) -> bool:
    """Whether ``checkpoint`` has a valid manifest.

    Raises:
        OSError: If that cannot be told, because a disk or a store does not answer.
    """
    try:
        manifests.read(checkpoint)
    except DamagedCheckpointError as error:
        # Not in a variable: its traceback, this frame and those that called it would hold each other, and all their tensors.
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, _NO_MANIFEST):
            raise error.__cause__ from error
        return False
    return True


def holds_a_checkpoint(checkpoint: Path) -> bool:
    """Whether a complete checkpoint lies at ``checkpoint`` itself, not where it points to."""
    return is_published(checkpoint) and not is_symlink(checkpoint)


def _check_ours(checkpoint: Path) -> None:
    """Leave a directory alone that another run has taken over: while this one stood still, or, in a store, at any time.

    Raises:
        DirectoryInUseError: It has.
    """
    whose = taken_over_by(checkpoint.parent)
    if not whose:
        return
    if in_store(checkpoint) is None:
        why = (
            "this one has lost the lock of it. Its host may have been cut off, or have stood still, for so long that it was "
            "taken for dead, or the lock's file was removed"
        )
    else:
        why = "a store has no locks, and the run that has begun last has the directory"
    raise DirectoryInUseError(
        f"another run has had {checkpoint.parent} since this one began ({whose}), and may write there now: {why}. "
        "Stop one of them"
    )


def taken_over_by(directory: Path) -> str:
    """Who has ``directory`` that this process had; "" for nobody. A file there is opened to know."""
    remote = in_store(directory)
    return lock.taken_over_by(directory) if remote is None else owner.taken_over_by(remote)


def _is_of_checkpoint(file: str) -> bool:
    """Whether a path seen from the directory is that of a file of a checkpoint: others may keep theirs there, too."""
    parts = file.split("/")
    return len(parts) == 3 and parts[1] in (names.WEIGHTS, names.EMA_WEIGHTS, names.CONTEXT)


def _settle(disk: Disk, path: Path, how: Callable[[Disk, Path], list[str]]) -> list[str]:
    """One of them. What cannot be removed (another user's, say) does not count, and keeps no run from starting."""
    try:
        return how(disk, path)
    except OSError as error:
        if not disk.can_rename:  # a store that does not answer: nothing is known
            raise
        return [f"{path.name} is left over and could not be dealt with: {error}"]


def _settle_marked(disk: Disk, mark: Path) -> list[str]:
    checkpoint = mark.with_name(mark.name[: -len(names.UNFINISHED)])
    file = checkpoint.with_name(checkpoint.name + ".ckpt")  # NeMo marks X.ckpt and X alike
    if is_published(checkpoint):
        disk.remove(mark)
        return [f"{checkpoint.name} is complete: its marker was left over"]
    disk.remove(checkpoint)
    disk.remove(file)
    disk.sync(mark.parent)
    disk.remove(mark)
    return [f"{checkpoint.name} was never finished, or was being removed: removed"]


def _settle_partial(disk: Disk, partial: Path) -> list[str]:
    disk.remove(partial)
    return [f"{partial.name} was never finished: removed"]


def _settle_aside(disk: Disk, aside: Path) -> list[str]:
    checkpoint = aside.with_name(aside.name[: -len(names.REPLACED)])
    if not is_symlink(aside) and not is_dir(aside / names.WEIGHTS):
        return []  # a stranger's, who likes the name
    if is_published(checkpoint):
        retract(disk, aside)
        return [f"{aside.name} has a successor: removed"]
    if _put_back(disk, checkpoint):
        return [f"{checkpoint.name} was being replaced: its earlier state is back"]
    return []


def _make_way(disk: Disk, aside: Path) -> None:
    """Remove what an earlier replacement has left at ``aside``.

    On NFS a directory stays as long as somebody on this host reads a file of it. It gets a name then that is nobody's, and
    goes when the next run starts.
    """
    try:
        retract(disk, aside)
    except OSError:
        hidden = (aside.with_name(f".{aside.name}-{number}.partial") for number in count())
        disk.rename(aside, next(name for name in hidden if not os.path.lexists(name)))
        disk.remove(names.marker(aside))


def _put_back(disk: Disk, checkpoint: Path) -> bool:
    """Give what was set aside its name again, if it is free. Whether there was something."""
    aside = _set_aside(checkpoint)
    if not exists(aside) or exists(names.marker(aside)) or os.path.lexists(checkpoint):
        return False
    disk.rename(aside, checkpoint)
    disk.sync(checkpoint.parent)
    return True


def _mark(disk: Disk, checkpoint: Path) -> None:
    disk.write(names.marker(checkpoint), [])
    disk.sync(checkpoint.parent)


def _refuse_what_is_no_checkpoint(path: Path) -> None:
    """What somebody else keeps under the name of a checkpoint is theirs. What Lightning and NeMo wrote is replaced.

    Raises:
        FileExistsError: If there is such a thing.
    """
    parts = (names.WEIGHTS, names.EMA_WEIGHTS, names.CONTEXT, names.MANIFEST, names.DCP_METADATA)
    is_one = is_symlink(path) or path.suffix == ".ckpt" or any(exists(path / part) for part in parts)
    if not is_one and not (is_dir(path) and not any(path.iterdir())):
        raise FileExistsError(
            errno.EEXIST, "this is no checkpoint, and is not replaced by one: move it, or change filename", str(path)
        )


def _set_aside(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + names.REPLACED)


def _make_durable(disk: Disk, directory: Path) -> None:
    """Create ``directory`` so that it outlives a crash: a new entry lasts once the directory above it is synced."""
    fresh = [d for d in (directory, *directory.parents) if not exists(d)]
    disk.make_directory(directory)
    for one in reversed(fresh):
        disk.sync(one.parent)


def _check_there(checkpoint: Path, manifest: Manifest) -> None:
    """A store has no lock: somebody who cleans up in the same directory may have taken files away meanwhile."""
    remote = in_store(checkpoint)
    sizes = {} if remote is None else remote.sizes()
    for file, record in manifest.files.items():
        if sizes.get(file) == record.size:
            continue
        path = checkpoint / file  # a listing may be some seconds old
        found = path.stat().st_size if exists(path) else None
        if found != record.size:
            what = "it is not" if found is None else f"{found} bytes are"
            raise OSError(errno.EIO, f"{record.size} bytes were written, {what} there", str(path))


def _directories(checkpoint: Path) -> list[Path]:
    """All directories of ``checkpoint``, the deepest first."""
    return [Path(root) for root, _, _ in os.walk(checkpoint, topdown=False)]
