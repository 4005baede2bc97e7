"""Where one training loader is, and how it gets there again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

from nemologger.errors import ConfigurationError
from nemologger.exact.loaders.batches import Batches
from nemologger.exact.loaders.described import described
from nemologger.exact.loaders.position import FRESH, Mark, Position, Start, less, of_dataset
from nemologger.exact.loaders.proof import Proof, Proofs
from nemologger.exact.loaders.source import Source, has_state
from nemologger.exact.loaders.sources import source_of
from nemologger.exact.loaders.untouched import untouched
from nemologger.exact.program.made import Made, made
from nemologger.exact.program.owned import NOTHING, Owned
from nemologger.exact.rng import RngState
from nemologger.exact.values import contents, plain_contents

log = logging.getLogger(__name__)

#: Of so many batches one gets a checksum at least, and each before that number. It takes as long as loading a small batch
#: does: others get one where that is less than this share of the time.
_SELDOM, _SHARE = 16, 0.01


_SHARES = (
    "the checkpoint has the state of {0} of them, each of which reads its own share of a dataset that has a state, in the "
    "middle of an epoch. It fits no other number: set num_workers={0}, or start {1} workers with the next epoch"
)
_ANEW = (
    "exact resume, training loader %s: the checkpoint has the state of its dataset in %d workers, and there are %d now: the "
    "dataset begins as the program makes it. Only the same num_workers goes on exactly"
)


class Feed:
    """One training loader of a run.

    Args:
        loader: As the user, or Lightning, made it.
        before_batch: Called with this feed whenever a batch is about to be taken.
        after_batch: The same, afterwards.
        salt: Numbers that set this loader's seeds apart from those of other loaders and ranks.
        is_training: Whether an iterator is the one that is trained from. Others do not count.
        most: So many bytes at most of lists and arrays that its sampler or dataset keeps go into a checkpoint.

    Attributes:
        early: Batches that were taken before training started. Whoever begins anew gets them again.
    """

    def __init__(
        self,
        loader: Any,
        before_batch: Callable[[Feed], None],
        after_batch: Callable[[Feed, Any], None],
        salt: Callable[[Feed], tuple[int, ...]],
        is_training: Callable[[object], bool],
        most: int,
    ) -> None:
        self.loader = loader
        self.source: Source = source_of(loader)
        self.before_batch = before_batch
        self.after_batch = after_batch
        self.is_training = is_training
        self._salt = salt
        self._most = most
        apart = getattr(loader, "num_workers", 0) and max(
            loader.num_workers, getattr(loader, "snapshot_every_n_steps", 0)
        )
        self._proofs = Proofs(self._roots(), apart) if self.source.in_doubt else None
        kept: dict[int, Any] = {}
        # What says itself what is to be kept, and is asked.
        self._at_start, self._at_batch = (
            Owned(
                roots,
                counters=self.source.counts,
                closed=[name for name, root in roots.items() if name in self.source.asked and has_state(root)],
                most=most,
                kept=kept,
            )
            for roots in (self.source.at_start(), self.source.at_batch())
        )
        self._mark = FRESH
        self._within: Position | None = None
        self._after: Position | None = None
        self._ended: Position | None = None
        self._running: Batches | None = None
        self._next_checksum = 0.0
        self._begins_late = False
        self.early: list[Any] = []

    def __iter__(self) -> Batches:
        """The batches of the next epoch; where a checkpoint left off, if it is resumed.

        Only their first batch shows who has asked for them.
        """
        return Batches(self)

    def _roots(self) -> dict[str, Any]:
        return {**self.source.at_start(), **self.source.at_batch()}

    # --- where ----------------------------------------------------------------------------------------------------

    @property
    def mark(self) -> Mark:
        """Where it is."""
        return self._mark if self._within is None else self._within.mark

    def note(self) -> Mark | Position:
        """All about where it is now, of which one in many is saved: what is large is left out."""
        if self.source.repeats and self._within is None and self._after is None and not self._mark.over:
            return self._mark  # which is all
        return self.position(self.mark, save=False)

    def position(self, mark: Mark, *, between: bool = False, save: bool = True, may_be_left: bool = False) -> Position:
        """All about ``mark``, which is where it is now; ``between`` two epochs, or within one.

        Without ``save`` it is one of many that are noted, of which one may be saved: what is large is left out. If it
        ``may_be_left`` where it is, because another loader ends the epoch, what decides about the next epoch is in it too.
        """
        waiting = self._within or self._after or (None if between else self._ended)
        if waiting is not None:
            return waiting
        running = None if self._running is None else self._running.inner
        # A copy: what is noted before a batch is taken must not change when it is.
        begins = mark.start is None or not (mark.batches or mark.over or between)  # at once, or anew
        state = None if begins else plain_contents.copied(self.source.state(running))
        if between or mark.over:
            position = Position(mark, state, self._at_start.values(), self._at_batch.values())
            self._ended = position if mark.over else None  # nothing changes until it begins anew
            return position
        at_start = self._at_start.values() if may_be_left else NOTHING
        needed = self.source.within_epoch
        if needed == "nothing":
            return Position(mark, state, at_start, self._at_batch.values() if may_be_left else NOTHING)
        look: Literal["all", "small"] = "all" if save else "small"
        at_batch = self._at_batch.values(counters=needed == "all" or "open", look=look)
        sizes = ahead = None
        # Training may have changed the sampler, weights of samples say.
        if needed == "all" and save and mark is self._mark:
            at_start = less(self._at_start.values(look="quiet"), at_batch)
            drawn = self.source.drawn(mark.batches)
            mark, sizes = mark._replace(last=drawn.checksum, checked=drawn.batches), self.source.sizes()
            if drawn.ahead is not None or drawn.ended:
                ahead = {"batches": drawn.ahead, "rng": drawn.rng, "ended": drawn.ended}
        return Position(mark, state, at_start, at_batch, sizes=sizes, ahead=ahead)

    def proof_in(self, position: Position) -> Proof | None:
        """What shows whether its state brings it back to the epoch of ``position``, if there is reason to doubt it."""
        newest = None if self._proofs is None else self._proofs.newest
        return newest if newest is not None and newest.position.mark.start is position.mark.start else None

    @property
    def limits(self) -> list[str]:
        """What cannot be promised, as far as that is known by now."""
        lost = {of_dataset(path): why for path, why in {**self._at_start.lost, **self._at_batch.lost}.items()}
        doubts = [] if self._proofs is None else self._proofs.limits
        return [*self.source.limits, *doubts] + [
            f"{path} has changed since training began, and is not saved: it {why}. A resumed run begins with it as the "
            "program makes it, which is right for a cache. If it decides about samples, make it in __init__(), of plain "
            "data, or give its dataset state_dict() and load_state_dict()"
            for path, why in lost.items()
        ]

    def name_large(self) -> None:
        """For a save of a position that was noted: see what could not be noted with it."""
        self._at_batch.name_large()

    def begin_epoch(self) -> None:
        """Forget what was counted: whatever is taken next belongs to another epoch."""
        self._mark, self._ended = FRESH, None

    def go_on_within(self, position: Position, proof: Proof | None = None) -> None:
        """Let the next batch be the one after ``position``, in an epoch of which there may be a ``proof``.

        Raises:
            ConfigurationError: If that is the place of another number of workers in their shares of a stream.
        """
        if (then := self.source.other_workers(position.state)) is not None:
            now = self.loader.num_workers
            raise ConfigurationError(f"{type(self.loader).__name__}(num_workers={now}): {_SHARES.format(then, now)}")
        self._within, self._after, self.early = position.of_today(self.loader), None, []
        if self._proofs is not None:
            self._proofs.go_on(proof)

    def go_on_after(self, position: Position) -> None:
        """Let the next batch be the first of the epoch after the one of ``position``."""
        position = position.of_today(self.loader)
        if (then := self.source.other_workers(position.state)) is not None:
            log.warning(_ANEW, type(self.loader).__name__, then, self.loader.num_workers)
            position = position._replace(state=None)
        self._within, self._after, self.early = None, position, []
        self._look_at_data()
        if position.state is not None:
            present = RngState.capture()
            self.source.end_of(plain_contents.copied(position.state), position.mark.over)
            present.restore()
        # Last: a dataset that was given its state is set to go on within an epoch, which is not what is wanted here.
        self._at_start.restore(position.at_start, exactly=True)
        self._at_batch.restore(position.at_batch, exactly=True)
        if (start := position.mark.start) is not None:
            self.source.keep_seed(start.order)

    def is_within(self) -> Position | None:
        """The position that was asked for, as long as no batch has been taken."""
        return self._within

    @cached_property
    def data(self) -> dict[str, Any]:
        """What identifies its dataset: a run must not go on with another one unnoticed. It takes time for millions.

        And the size of its batches, by which the place in it is counted.
        """
        return {
            **described(getattr(self.loader, "dataset", None)),
            "batch_size": getattr(self.loader, "batch_size", None),
        }

    def _look_at_data(self) -> None:
        """As the program makes it: what is loaded later (a cache), or put back (an epoch's number), is no other data."""
        _ = self.data, self.names

    @property
    def has_workers(self) -> bool:
        """Whether batches are loaded by other processes: what is drawn there does not shift what is drawn here."""
        return getattr(self.loader, "num_workers", 0) != 0

    @cached_property
    def names(self) -> Made:
        """The order of names in it: numbers that are given by one that differs from start to start stand for others."""
        parts = {name: getattr(self.loader, name, None) for name in ("dataset", "collate_fn")}
        return made({name: part for name, part in parts.items() if part is not None}, arrays=False)

    def release(self) -> None:
        """Leave the loader as it was found, and let go of what is being iterated over."""
        self._running = None
        self.source.release()

    # --- taking ---------------------------------------------------------------------------------------------------

    def taken_early(self) -> tuple[Batches, list[Any]] | None:
        """Whose place to take, and with which batches once more: Lightning drops them when it begins the epoch."""
        return (self._running, list(self.early)) if self.early and self._running is not None else None

    def follow(self, batches: Batches) -> None:
        """Take what comes next for ``batches``."""
        self._running = batches

    def beside(self) -> Iterator[Any]:
        """Batches for somebody else, at any time: what decides about training's batches stays as it is."""
        batches: Iterator[Any] | None = None
        theirs = NOTHING
        while True:
            look: Literal["all", "not"] = "all" if batches is None else "not"  # lists change when an epoch begins
            own = self._at_start.values(look=look)
            if batches is None:
                batches = self.source.beside()
            else:
                self._at_start.restore(theirs)
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                theirs = self._at_start.values(look="not")
                self._at_start.restore(own, exactly=True)
            yield batch

    def take_first(self, batches: Batches) -> Any:
        """The first batch of ``batches``. Everything that begins an epoch happens here, not when it is announced."""
        self._running = self._ended = None  # ends the workers of the epoch before
        self._look_at_data()
        within = self._within
        if within is not None and self._repeats_end(within):
            raise StopIteration
        self._within = None
        if within is not None and within.mark.start is not None:
            self._prove(batches, within, within.mark.start)
            self._begin_at(batches, within, within.mark.start)
        else:
            self._begin(batches, 0 if within is None else within.mark.batches)
        self._running = batches
        try:
            with self.source.first():
                return self.take(batches, again=self._mark.batches > 0)
        except StopIteration:
            if within is None or not within.mark.restarts:
                raise
        finally:
            self.source.after_first(batches.inner)
        # Saved behind the last batch of a pass that was not its first: it has only now said so. Lightning, which has just
        # been told of the end of one pass and asks for a batch of the next, would take another end for that of the epoch.
        return self.take_first(batches)

    def take(self, batches: Batches, *, again: bool = False) -> Any:
        """The next batch of ``batches``; ``again`` if they have just been begun in the middle of an epoch."""
        start, count, restarts, _, last, checked = self._mark
        try:
            if self._proofs is None:
                batch = next(batches.inner)
            elif again:
                batch = self._proofs.take_again(batches.inner, late=self._begins_late)
            else:
                batch = self._proofs.take(batches.inner, count, self._here)
        except StopIteration:
            self._mark = Mark(start, count, restarts, True, last, checked)
            raise
        count += 1
        if self.source.repeats:
            began = time.perf_counter()
            if count < _SELDOM or count % _SELDOM == 0 or began > self._next_checksum:
                last, checked = contents.of_batch(batch), count
                ended = time.perf_counter()
                self._next_checksum = ended + (ended - began) / _SHARE
        self._mark = Mark(start, count, restarts, self.source.has_ended(batches.inner), last, checked)
        return batch

    def _here(self) -> Position:
        return self.position(self._mark, save=False)

    def _prove(self, batches: Batches, within: Position, start: Start) -> None:
        """See whether its state brings back what is known of the epoch, and leave everything as it was."""
        proofs = self._proofs
        if proofs is None:
            return
        if proofs.newest is None:
            proofs.untried = within.state is not None and not self.source.begins_again(within.mark.batches)
            return
        for anew in self.source.ways:
            self.source.anew = anew
            with untouched(self._roots(), self._most):
                proofs.newest.rng.restore()
                try:
                    self._begin_at(batches, proofs.newest.position, start)
                    with self.source.first():
                        proofs.check(batches.inner, late=self._begins_late)
                except Exception:  # noqa: BLE001  it is the program's: what is there no longer may not be needed either
                    proofs.failed = True
                self.source.after_first(batches.inner)
                batches.inner = iter(())
            if not proofs.failed:
                return
        self.source.anew = False

    def _begin(self, batches: Batches, skip: int) -> None:
        self._after = None
        if self._proofs is not None:
            self._proofs.begin()
        self.source.anew = False
        rng = RngState.capture()
        start = Start(rng, self._at_start.values(), rng.seed(*self._salt(self)), self.source.order)
        self._mark = Mark(start, skip, self._mark.restarts + 1 if self._mark.over else 0, False)
        batches.inner = self.source.begin(start.seed, skip, None, lambda: None)

    def _begin_at(self, batches: Batches, position: Position, start: Start) -> None:
        if self._proofs is not None:
            self._proofs.look_at_threads()
        present, self._begins_late = RngState.capture(), True
        start.rng.restore()
        self._at_start.restore(start.owned, exactly=True)  # Lightning may have taken a batch already

        def ready() -> None:
            self._begins_late = False
            if position.mark.batches:  # else all of the epoch is to be repeated
                present.restore()
            # As much has been drawn as when it was saved. The order of other data is none of these.
            if position.sizes is not None and position.sizes[:2] == self.source.sizes()[:2]:
                self._at_start.restore(position.at_start, exactly=True)
                self.source.keep_seed(start.order)
            self._at_batch.restore(position.at_batch)

        self._mark = position.mark
        self.source.keep_seed(start.order)
        self.source.order = start.order
        if self.source.repeats or position.sizes is not None:
            self.source.expect(position.drawn())
        state = plain_contents.copied(position.state)  # the stream may change it
        batches.inner = self.source.begin(start.seed, position.mark.batches, state, ready)

    def _repeats_end(self, position: Position) -> bool:
        """Whether this loader is to end now, as it once did in this epoch, before it goes on.

        Lightning takes note of loaders that have ended when it combines several.
        """
        mark = position.mark
        if mark.over:
            self._mark = mark
            self.go_on_after(position)
            return True
        if mark.restarts == self._mark.restarts:
            return False
        self._mark = mark._replace(over=True)
        return True
