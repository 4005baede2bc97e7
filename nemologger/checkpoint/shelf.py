"""What one callback keeps in a directory: found again at the start, settled after every save.

A :class:`Shelf` is a value that all ranks share. Rank 0 looks at the directory, publishes ``-last`` and removes what is
surplus; the others are told the outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint.find import Status, survey
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.retention import Kept, Policy
from nemologger.disk import Disk

log = logging.getLogger(__name__)

Owner = Mapping[str, str | None]


@dataclass(frozen=True)
class Shelf:
    """What is kept.

    Attributes:
        kept: Every published checkpoint of the owner; ``-last`` too, if it is a directory.
        last: The path of ``-last``, or "".
        failed: Why the latest change of it failed, or "".
    """

    kept: tuple[Kept, ...] = ()
    last: str = ""
    failed: str = ""

    @property
    def needed(self) -> set[str]:
        """Paths that must not be touched on somebody else's behalf."""
        return {kept.path for kept in self.kept} | ({self.last} if self.last else set())


@dataclass(frozen=True)
class Decision:
    """What is to be saved.

    Attributes:
        path: The directory to write.
        last: The ``-last`` to publish with it: another directory, a link, ``path`` itself, or None.
        score: The monitored metric, if there is one.
        ranked: Whether it competes for the best k.
    """

    path: str
    last: str | None
    score: float | None
    ranked: bool


def look(disk: Disk, directory: Path, owner: Owner, *, alone: bool) -> Shelf:
    """What earlier lives of the run have left in ``directory``. Cleans up after them first.

    Args:
        disk: Where.
        directory: The checkpoints.
        owner: Whose checkpoints count: monitor, mode, and the callback's own key.
        alone: No other callback of the run has this monitor and mode; then a changed key (another interval, say) does not
            make earlier checkpoints somebody else's.
    """
    for line in commit.tidy(disk, directory):
        log.warning("cleaning up after an earlier run in %s: %s", directory, line)
    mine: list[tuple[Path, Manifest]] = []
    for found in survey(directory):
        if found.status is Status.COMPLETE and found.manifest is not None:
            theirs = found.manifest.owner
            same = all(theirs.get(key) == owner.get(key) for key in ("monitor", "mode"))
            if same and (alone or theirs.get("key") == owner.get("key")):
                mine.append((found.path, found.manifest))
    lasts = [(manifest.order, str(path)) for path, manifest in mine if path.name.endswith(names.LAST)]
    kept = tuple(as_kept(path, manifest) for path, manifest in mine if not path.is_symlink())
    return Shelf(kept, max(lasts)[1] if lasts else "")


def settle(
    disk: Disk,
    shelf: Shelf,
    policy: Policy,
    decision: Decision,
    published: Manifest,
    *,
    link: bool,
    protected: set[str],
) -> Shelf:
    """After a commit: move ``-last``, then remove what is surplus.

    Args:
        disk: Where.
        shelf: What was kept so far.
        policy: What is to be kept.
        decision: What was saved.
        published: Its manifest.
        link: Make ``-last`` a symbolic link.
        protected: Paths that somebody else keeps.
    """
    path = Path(decision.path)
    kept = [k for k in shelf.kept if k.path != decision.path] + [as_kept(path, published)]
    last = decision.last or ""
    if last not in ("", decision.path):
        try:
            if link:
                commit.point(disk, path, Path(last))
            else:
                commit.duplicate(disk, path, Path(last), published)
        except OSError as error:
            return Shelf(tuple(kept), shelf.last, f"{last} was not made from {path}, which is complete: {error}")
        kept = [k for k in kept if k.path != last]
        if not link:
            kept.append(as_kept(Path(last), published, last=True))
    going = policy.surplus(kept, decision.path if link else last)
    doomed = [k.path for k in going]
    if shelf.last not in ("", last, *doomed) and Path(shelf.last).is_symlink():
        doomed.insert(0, shelf.last)
    for victim in doomed:
        if victim not in protected:
            _retract(disk, Path(victim))
    return Shelf(tuple(k for k in kept if k not in going), last)


def as_kept(path: Path, manifest: Manifest, *, last: bool | None = None) -> Kept:
    """The checkpoint at ``path``, as far as keeping it goes."""
    last = manifest.last if last is None else last
    return Kept(str(path), manifest.step, manifest.time, manifest.score, manifest.ranked and not last, last)


def _retract(disk: Disk, victim: Path) -> None:
    try:
        commit.retract(disk, victim)
    except OSError as error:  # a checkpoint too many is no reason to stop
        log.warning("checkpoint %s could not be removed: %s. Remove it by hand.", victim, error)
