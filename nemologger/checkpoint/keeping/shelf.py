"""What one callback keeps in a directory: found again at the start, settled after every save.

A :class:`Shelf` is a value that all ranks share. Rank 0 looks at the directory, publishes ``-last`` and removes what is
surplus; the others are told the outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint.find import Status, survey
from nemologger.checkpoint.keeping.decision import Decision
from nemologger.checkpoint.keeping.retention import Kept, Policy
from nemologger.checkpoint.manifest import Manifest
from nemologger.disk import Disk
from nemologger.disk.there import is_symlink

log = logging.getLogger(__name__)

Owner = Mapping[str, str | None]
Remove = Callable[[Path], None]


@dataclass(frozen=True)
class Shelf:
    """What is kept.

    Attributes:
        kept: Every published checkpoint of the owner; ``-last`` too, if it is a directory.
        last: The path of ``-last``, or "".
        failed: Why the latest change of it failed, or "".
        life: The latest line of training in the directory.
        origin: The life that began from scratch and has led to it.
        newest_step: The newest step of that line, -1 without a checkpoint.
        newest_samples: How many samples it had seen by then.
    """

    kept: tuple[Kept, ...] = ()
    last: str = ""
    failed: str = ""
    life: int = 0
    origin: int = 0
    newest_step: int = -1
    newest_samples: int = 0

    @property
    def needed(self) -> set[str]:
        """Paths that must not be touched on somebody else's behalf."""
        return {kept.path for kept in self.kept} | ({self.last} if self.last else set())

    def line_from(self, step: int, samples: int) -> tuple[int, int]:
        """Life and origin of a run that begins here at ``step``, after so many ``samples``.

        One that goes back behind what was saved begins another line of training, and the next start follows that one.
        """
        # Samples tell where no step is counted.
        if (step, step or samples) >= (self.newest_step, self.newest_step or self.newest_samples):
            return self.life, self.origin
        return self.life + 1, self.origin if step or samples else self.life + 1


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
    complete = [
        (found.path, found.manifest)
        for found in survey(directory)
        if found.status is Status.COMPLETE and found.manifest is not None
    ]
    mine = [(path, manifest) for path, manifest in complete if _is_mine(path, manifest, owner, alone=alone)]
    lasts = [(manifest.order, str(path)) for path, manifest in mine if path.name.endswith(names.LAST)]
    kept = tuple(as_kept(path, manifest) for path, manifest in mine if not is_symlink(path))
    newest = max((manifest for _, manifest in complete), key=lambda m: m.order, default=Manifest(step=-1, epoch=0))
    strangers = [path.name for path, manifest in complete if manifest.owner.get("monitor") != owner.get("monitor")]
    if strangers and alone:
        log.info("%s: kept with another monitor, and left alone: %s", directory, ", ".join(strangers))
    last = max(lasts)[1] if lasts else ""
    return Shelf(
        kept,
        last,
        life=newest.life,
        origin=newest.origin,
        newest_step=newest.step,
        newest_samples=newest.consumed_samples,
    )


def _is_mine(path: Path, manifest: Manifest, owner: Owner, *, alone: bool) -> bool:
    original = path.resolve().name if is_symlink(path) else path.name
    if manifest.name not in ("", original):
        return False  # a copy that somebody made under another name
    same = all(manifest.owner.get(key) == owner.get(key) for key in ("monitor", "mode"))
    return same and (alone or manifest.owner.get("key") == owner.get("key"))


def prune(disk: Disk, remove: Remove, shelf: Shelf, policy: Policy, *, protected: set[str]) -> Shelf:
    """Remove what is surplus before anything was saved: what a dead run had no time to, or another policy kept.

    Args:
        disk: Where.
        remove: Takes a checkpoint away.
        shelf: What is kept.
        policy: What is to be kept.
        protected: Paths that must stay, such as the one that the run has resumed from.
    """
    last = shelf.last
    if last and is_symlink(pointer := disk.path(last)):
        last = str(pointer.resolve())
    going = [k for k in policy.surplus(shelf.kept, last) if k.path not in protected]
    for victim in going:
        remove(disk.path(victim.path))
    return replace(shelf, kept=tuple(k for k in shelf.kept if k not in going))


def claim(disk: Disk, decision: Decision) -> Decision:
    """``decision`` with a name that is free, where a complete checkpoint cannot be set aside for its successor.

    The one that has the name is complete until this one is, and is removed then. What merely points to another one gives its
    name up.
    """
    if disk.can_rename or not commit.holds_a_checkpoint(disk.path(decision.path)):
        return decision
    is_last = decision.last == decision.path
    stem = decision.path.removesuffix(names.LAST) if is_last else decision.path
    for number in count(1):
        path = f"{stem}-v{number}{names.LAST if is_last else ''}"
        if not commit.holds_a_checkpoint(disk.path(path)):
            break
    return replace(decision, path=path, last=path if is_last else decision.last, replaces=decision.path)


def settle(
    disk: Disk,
    remove: Remove,
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
        remove: Takes a checkpoint away, at once or soon; a failure is its own business.
        shelf: What was kept so far.
        policy: What is to be kept.
        decision: What was saved.
        published: Its manifest.
        link: Make ``-last`` a symbolic link.
        protected: Paths that somebody else keeps.
    """
    path = disk.path(decision.path)
    kept = [k for k in shelf.kept if k.path not in (decision.path, decision.replaces)] + [as_kept(path, published)]
    last = decision.last or ""
    if last not in ("", decision.path):
        try:
            if link:
                commit.point(disk, path, disk.path(last))
            else:
                commit.duplicate(disk, path, disk.path(last), published)
        except OSError as error:
            return replace(
                shelf, kept=tuple(kept), failed=f"{last} was not made from {path}, which is complete: {error}"
            )
        kept = [k for k in kept if k.path != last]
        if not link:
            kept.append(as_kept(disk.path(last), published, last=True))
    going = policy.surplus(kept, decision.path if link and last else last)
    doomed = [k.path for k in going] + ([decision.replaces] if decision.replaces else [])
    is_there_still = shelf.last in ("", last, *doomed, *(k.path for k in kept))
    # What is kept is no link. Asking a store might fail, and a checkpoint is published.
    if not is_there_still and (not disk.can_rename or _is_link(disk.path(shelf.last))):
        doomed.insert(0, shelf.last)
    for victim in doomed:
        if victim not in protected:
            remove(disk.path(victim))
    return replace(shelf, kept=tuple(k for k in kept if k not in going), last=last, failed="")


def _is_link(path: Path) -> bool:
    try:
        return is_symlink(path)
    except OSError as error:
        log.warning("%s, which has a successor, may be left over: %s", path, error)
        return False


def as_kept(path: Path, manifest: Manifest, *, last: bool | None = None) -> Kept:
    """The checkpoint at ``path``, as far as keeping it goes."""
    last = manifest.last if last is None else last
    return Kept(
        str(path),
        manifest.step,
        manifest.time,
        manifest.score,
        manifest.ranked and not last,
        last,
        manifest.life,
        manifest.origin,
        manifest.has_optimizer,
        manifest.consumed_samples,
    )
