"""Whether a stream's own state brings it back: it does if a batch of the epoch, taken from it once more, is the same.

Many a ``state_dict()`` says which sample is next, and not in which order they come: ``__iter__`` draws that anew. What it
draws with the first batch of an epoch alone is drawn by a resumed run from the same generators once more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nemologger.exact.loaders.moment import Moment
from nemologger.exact.loaders.position import Position, Start
from nemologger.exact.rng import RngState
from nemologger.exact.values import contents, plain_contents

_OTHERS = (
    "its state does not bring it back: a batch of the epoch, whose checksum is in the checkpoint, was loaded once more, and "
    "is another, draws other numbers, or is no longer there. Training goes on with other samples than in the run that was "
    "stopped. Keep in state_dict() what __iter__() draws (an order of samples), or draw it from a generator that is seeded "
    "with the number of the epoch; or leave out state_dict(): the batches of the epoch are loaded once more then"
)
_UNTRIED = (
    "whether its state brings it back could not be tried: it loads in a thread of its own, keeps more than 16 MB of tensors "
    "in its state, or was stopped after the very first batches of an epoch. If __iter__() draws what state_dict() does not "
    "hold, an order of samples for example, training goes on with other samples than in the run that was stopped"
)
#: After the first batches of an epoch one of so many is noted.
_EACH = 64
#: Bytes of a state that may be in a checkpoint a second time.
_MOST = 2**24


@dataclass(frozen=True)
class Proof:
    """A batch of an epoch.

    Attributes:
        position: The place before it.
        rng: The global generators before it.
        batch: Its checksum.
        after: Checksums of all generators after it, by name.
        first: All generators before the first batch of the epoch.
        at_first: The names of those that moved with that batch, and not with others that were looked at.
    """

    position: Position
    rng: RngState
    batch: int
    after: dict[str, int]
    first: Moment | None
    at_first: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """As plain types, without the start of the epoch."""
        position = self.position._replace(mark=self.position.mark._replace(start=None))
        return {
            "position": position.to_plain(),
            "rng": self.rng.to_plain(),
            "batch": self.batch,
            "after": self.after,
            "first": None if self.first is None else self.first.to_plain(),
            "at_first": list(self.at_first),
        }

    @staticmethod
    def from_plain(plain: dict[str, Any], start: Start | None) -> Proof:
        """What :meth:`to_plain` was made of, in the epoch that began with ``start``."""
        position, first = Position.from_plain(plain["position"]), plain["first"]
        return Proof(
            position._replace(mark=position.mark._replace(start=start)),
            RngState.from_plain(plain["rng"]),
            plain["batch"],
            plain["after"],
            None if first is None else Moment.from_plain(first),
            tuple(plain["at_first"]),
        )


class Proofs:
    """Takes the batches of a stream, and notes one now and then.

    Args:
        roots: What may draw from generators of its own, by name.
        apart: After so many batches all processes that load them have begun, and have said where they are; 0 without any.

    Attributes:
        newest: Of this epoch.
        failed: Whether the state of a checkpoint did not bring back what was noted.
        untried: Whether a state of a checkpoint had to be believed, as nothing was noted.
        may_try: Whether a trial ends with its iterator: a thread may go on, and take what is next of the stream. And whether
            there is a state that is not too large.
    """

    def __init__(self, roots: Mapping[str, Any], apart: int) -> None:
        self.roots = roots
        self._apart = apart
        self.newest: Proof | None = None
        self.failed = self.untried = False
        self.may_try = True
        self._threads: set[threading.Thread] = set()
        self._first: Moment | None = None
        self._at_first: tuple[str, ...] = ()
        self._seldom: set[str] = set()
        self._is_due = False

    @property
    def limits(self) -> list[str]:
        """What shows of the state."""
        return [_OTHERS] * self.failed + [_UNTRIED] * self.untried

    def begin(self) -> None:
        """An epoch begins."""
        self.newest, self._first, self._at_first, self._seldom = None, None, (), set()
        self.look_at_threads()

    def look_at_threads(self) -> None:
        """The stream is about to begin."""
        self._threads = set(threading.enumerate())

    def _has_begun(self) -> None:
        new = [thread.name for thread in threading.enumerate() if thread not in self._threads]
        if not self._apart and not all(name.startswith("nemologger-") for name in new):
            self.may_try = False

    def go_on(self, newest: Proof | None) -> None:
        """In an epoch of which this is known."""
        self.begin()
        self.newest = newest
        if newest is not None:
            self._first, self._at_first, self._seldom = newest.first, newest.at_first, set(newest.at_first)

    def take(self, batches: Iterator[Any], count: int, place: Callable[[], Position]) -> Any:
        """The next of ``batches``, of which ``count`` are out; ``place`` says where that is."""
        often = count & (count - 1) == 0 or count % _EACH == 0 or count == self._apart
        if not (self.may_try and (often or self._is_due)) or 0 < count < self._apart:
            return next(batches)
        try:
            position = place()
        except Exception:  # noqa: BLE001  it is the program's: one that has a state between epochs alone
            self.may_try = False
            return next(batches)
        if plain_contents.bytes_of_tensors(position.state) > _MOST:
            self.may_try, self.newest = False, None
            return next(batches)
        before = Moment.of(self.roots)
        batch = next(batches)
        after = Moment.of(self.roots)
        moved = after.moved_since(before)
        if count == 0:
            self._has_begun()
            self._first, self._at_first = before, tuple(sorted(moved))
            return batch
        self._at_first = tuple(name for name in self._at_first if name not in moved)
        first, generators = self._first if self._at_first else None, after.digests()
        self._is_due = not moved.isdisjoint(self._seldom)
        self._seldom |= generators.keys() - moved
        if not self._is_due:
            self.newest = Proof(position, before.rng, contents.of_batch(batch), generators, first, self._at_first)
        elif self.newest is not None:  # an order of what comes now may be drawn with it, as for a shard
            self.newest = replace(self.newest, first=first, at_first=self._at_first)
        return batch

    def take_again(self, batches: Iterator[Any], *, late: bool) -> Any:
        """The next of ``batches``, which have just been begun in the middle of an epoch.

        With ``late`` they only begin now, and set the generators themselves.
        """
        first, names = (None, ()) if self.newest is None else (self.newest.first, self.newest.at_first)
        present = None if late or first is None else Moment.of(self.roots)
        if present is not None and first is not None:
            first.restore(self.roots, names)
        try:
            return next(batches)
        finally:
            self._has_begun()
            if present is not None:
                present.restore(self.roots, names)

    def check(self, batches: Iterator[Any], *, late: bool) -> None:
        """Note whether the next of ``batches``, which have just been begun there, is the one that was noted."""
        proof = self.newest
        if proof is None:
            return
        try:
            same = contents.of_batch(self.take_again(batches, late=late)) == proof.batch
        except StopIteration:
            same = False
        self.failed = not (same and Moment.of(self.roots).digests() == proof.after)
