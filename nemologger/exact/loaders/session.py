"""All training loaders of one fit, and the generators that they share with the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import torch

from nemologger.exact.loaders.feed import Feed
from nemologger.exact.loaders.loader import ResumableLoader, feed_of, is_resumable
from nemologger.exact.loaders.position import Mark, Position, rescaled, skipping
from nemologger.exact.loaders.proof import Proof
from nemologger.exact.rng import RngState
from nemologger.exact.values.plain_contents import MOST_BYTES

#: Bytes of lists and arrays of all ranks together, and of one rank at least.
_MOST_OF_ALL, _LEAST = 2**28, 2**16


def most_of_each(ranks: int) -> int:
    """Bytes that a rank keeps of lists and arrays: rank 0 writes those of all ``ranks``."""
    return min(MOST_BYTES, max(_MOST_OF_ALL // ranks, _LEAST))


class Fit(Protocol):
    """What a session needs to know about the fit that it belongs to."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def ranks(self) -> int:
        """How many processes there are."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def loaders(self) -> list[Any]:
        """The training loaders, in order."""

    def trains_from(self, batches: object) -> bool:
        """Whether this iterator is training's, rather than that of somebody who looks at the data too."""

    def fetches_ahead(self) -> bool:
        """Whether a batch is taken before the one before it is trained on."""

    def round(self) -> int:
        """A number that changes when the next batch is taken of all loaders."""

    def goes_on_within_epoch(self) -> bool:
        """For the start of training: whether it goes on where an epoch was left."""


@dataclass(frozen=True)
class Place:
    """Where a rank is between two batches.

    Attributes:
        rng: Its generators.
        fetching: Its generators before the batch that has already been taken for the next step, if one has.
        positions: Its loaders.
        proofs: What is known of the epochs of these.
    """

    rng: RngState
    fetching: RngState | None
    positions: list[Position]
    proofs: list[Proof | None] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        """As plain types."""
        return {
            "rng": self.rng.to_plain(),
            "fetching": None if self.fetching is None else self.fetching.to_plain(),
            "positions": [position.to_plain() for position in self.positions],
            "proofs": [None if proof is None else proof.to_plain() for proof in self.proofs],
        }

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Place:
        """What :meth:`to_plain` was made of."""
        fetching, positions = plain["fetching"], [Position.from_plain(position) for position in plain["positions"]]
        return Place(
            RngState.from_plain(plain["rng"]),
            None if fetching is None else RngState.from_plain(fetching),
            positions,
            [
                None if proof is None else Proof.from_plain(proof, position.mark.start)
                for proof, position in zip(plain.get("proofs", ()), positions, strict=False)
            ],
        )

    def on_other_ranks(self, rank: int, before: int, now: int, device: torch.device) -> Place:
        """The place of ``rank`` of ``now`` ranks after as many samples as ``before`` ranks had seen here."""
        positions = [rescaled(position, before, now) for position in self.positions]
        return Place(self.rng.for_another_rank(rank, device), None, positions)


class _Round(NamedTuple):
    """The moment before a batch was taken of all loaders."""

    number: int
    rng: RngState | None
    notes: list[Mark | Position]


class Session:
    """The loaders of one fit.

    Args:
        fit: The fit.

    Attributes:
        fetched_too_early: Lightning took batches before it was known where to go on; it must begin again.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self._feeds: list[Feed] = []
        self._changed = self._draws = False
        self._ahead: bool | None = None
        self._round: _Round | None = None
        self._first: list[int] = []  # how many batches were out before the first of this epoch was taken ahead
        self._settled: list[Mark | Position] = []
        self._trained = self._ended = False
        self._place: Place | None = None
        self._resumed: Place | None = None
        self._epoch_over = False
        self._skip = 0
        self._waiting: RngState | None = None
        self._fetching: RngState | None = None
        self._training = False
        self._early = False
        self.fetched_too_early = False

    # --- loaders --------------------------------------------------------------------------------------------------

    def wrap(self, loader: Any) -> ResumableLoader:
        """``loader`` as Lightning is to see it."""
        if is_resumable(loader):
            return loader  # type: ignore[no-any-return]
        self._round, self._ahead, self._settled, self._changed = None, None, [], True
        self._first = []
        if not self._training:
            self._aim()  # Lightning may make loaders again of which it has taken batches already
        most = most_of_each(self._fit.ranks)
        return ResumableLoader(
            Feed(loader, self._before_batch, self._after_batch, self._salt, self._fit.trains_from, most)
        )

    @property
    def feeds(self) -> list[Feed]:
        """The feeds of the loaders that are in use."""
        if self._changed:
            feeds = [feed_of(loader) for loader in self._fit.loaders() if is_resumable(loader)]
            for gone in self._feeds:
                if not any(gone.loader is feed.loader for feed in feeds):
                    gone.release()
            self._feeds, self._changed = feeds, False
            # One of several may begin anew, which depends on the generators even if its batches do not.
            self._draws = len(feeds) > 1 or any(feed.source.draws for feed in feeds)
        return self._feeds

    def release(self) -> None:
        """Leave every loader as it was found."""
        for feed in self.feeds:
            feed.release()

    def _salt(self, feed: Feed) -> tuple[int, ...]:
        return self._fit.rank, next((i for i, known in enumerate(self.feeds) if known is feed), 0)

    # --- resume ---------------------------------------------------------------------------------------------------

    def go_on(self, place: Place, *, epoch_over: bool) -> None:
        """Continue at ``place``; with ``epoch_over`` in the epoch after it."""
        self._resumed, self._epoch_over = place, epoch_over
        self._aim()
        self._begin_again()

    def skip(self, batches: int) -> None:
        """Continue after so many batches of an epoch that nothing else is known of."""
        self._skip = batches
        self._begin_again()

    def _aim(self) -> None:
        """Let the next batch be the first after the checkpoint, if there is one."""
        place = self._resumed
        if place is not None:
            self._place, self._waiting, self._fetching = place, place.rng, place.fetching

    def _begin_again(self) -> None:
        self._training = self._trained = False
        self._first = []
        self.fetched_too_early = any(feed.mark.batches for feed in self.feeds)
        for feed in self.feeds:
            feed.begin_epoch()
        if self.feeds:
            self._hand_out()

    def on_train_start(self) -> None:
        """From here on batches are trained on."""
        self._hand_out()
        self._training = True
        for feed in self.feeds:
            within = feed.is_within()
            if within is not None and not self._fit.goes_on_within_epoch():
                feed.go_on_after(within)
        if self._waiting is not None:
            self._waiting.restore(self._fit.device)

    def leave_loaders(self) -> None:
        """Others are made before the first batch: whatever was drawn for a batch of these was drawn for nothing."""
        if self._resumed is not None and self._epoch_over:
            self._waiting, self._early = self._resumed.rng, False
            self.settle()

    def end_epoch(self) -> None:
        """An epoch ends, or the one that was trained to its last batch before the checkpoint does so only now.

        Whatever draws then does so before a batch of the next one is taken: what Lightning has taken already is taken anew.
        """
        self._ended = True
        for feed in self.feeds:
            within = feed.is_within()
            if within is not None:  # another loader has come to its end, and this one was not asked for more
                feed.go_on_after(within)
        if self._early and not self._trained and self._resumed is not None:
            self._take_anew()
        self.settle()

    def _take_anew(self) -> None:
        self._aim()
        self._begin_again()
        self._training, self._early = True, False

    def settle(self) -> None:
        """Set the generators to where the checkpoint left them, before the first thing that draws from them."""
        if self._waiting is not None:
            self._waiting.restore(self._fit.device)
            self._waiting = None

    def _hand_out(self) -> None:
        """Tell each loader where to go on."""
        place, self._place = self._place, None
        skip, self._skip = self._skip, 0
        if place is None:
            for feed in self.feeds if skip else ():
                feed.go_on_within(skipping(skip))
            return
        for feed, position, proof in zip_longest(self.feeds, place.positions, place.proofs):
            if feed is None or position is None:
                return
            if self._epoch_over:
                feed.go_on_after(position)
            elif position.mark.start is not None or position.mark.batches:
                feed.go_on_within(position, proof)

    # --- batches --------------------------------------------------------------------------------------------------

    def begin_epoch(self) -> bool:
        """An epoch begins; whether what has been taken of it already is to be taken anew, behind the hooks that begin it.

        They may draw, or tell the dataset the number of the epoch. Lightning takes nothing before them but when training
        starts, and a run that was not stopped started with another epoch.
        """
        again = self._early and not self._trained and self._resumed is not None and self._epoch_over
        if again:
            self._take_anew()
        self.settle()
        if self._trained:
            self._resumed = None
        if self._trained or self._ended:  # an epoch may end without a batch
            self._trained = self._ended = False
            self._first = []
            for feed in self.feeds:
                feed.begin_epoch()
        return again

    def _before_batch(self, feed: Feed) -> None:
        if self._ahead is None:
            self._ahead = self._fit.fetches_ahead()
        if self._place is not None or self._skip:
            self._hand_out()
        if self._waiting is not None:
            self._prepare()
        if self._ahead:
            if self._early and self._training:
                self._early = False
                for other in self.feeds:
                    other.early = []
            self._note_round()

    def _prepare(self) -> None:
        """Set the generators for the first batch after a resume."""
        if self._training:
            self.settle()
        else:
            early = self._fetching or self._waiting
            if early is not None:
                early.restore(self._fit.device)

    def _after_batch(self, feed: Feed, batch: Any) -> None:
        if self._waiting is None or self._training:
            return
        feed.early.append(batch)
        self._early = True
        # Lightning has taken a batch before training starts. In a run that was not stopped, that happened while the step
        # before it was under way (then ``_fetching`` is known), or when the epoch began.
        present = RngState.capture(self._fit.device)
        if self._fetching is not None:
            self._fetching = present
        else:
            self._waiting = present

    def _note_round(self) -> None:
        number = self._fit.round()
        if self._round is None or self._round.number != number:
            feeds = self.feeds
            rng = RngState.capture(self._fit.device) if self._draws else None
            self._round = _Round(number, rng, [feed.note() for feed in feeds])
            self._first = self._first or [feed.mark.batches for feed in feeds]

    def batch_trained(self) -> None:
        """A step is done: what a checkpoint of this moment is to say about the loaders."""
        self._trained = True
        if self._ahead:
            self._settled = [] if self._round is None else self._round.notes
        else:
            self._settled = [feed.mark for feed in self.feeds]

    # --- save -----------------------------------------------------------------------------------------------------

    def place(self, *, epoch_over: bool, aside: RngState | None = None) -> Place:
        """Where this rank is; ``epoch_over`` if what comes next is another epoch.

        Args:
            epoch_over: Whether it is.
            aside: The generators of training, while validation uses them.
        """
        place = self._place_of(epoch_over, aside)
        if epoch_over:
            return place
        return replace(place, proofs=[f.proof_in(p) for f, p in zip(self.feeds, place.positions, strict=True)])

    def _place_of(self, epoch_over: bool, aside: RngState | None) -> Place:
        feeds = self.feeds
        rng = self._waiting or aside or RngState.capture(self._fit.device)
        settled = self._settled if self._trained and len(self._settled) == len(feeds) else None
        if not self._ahead or self._round is None or epoch_over:
            marks = settled if settled is not None and not self._ahead else [_before_step(feed) for feed in feeds]
            pairs = [(f, m) for f, m in zip(feeds, marks, strict=True) if isinstance(m, Mark)]
            several = len(feeds) > 1
            at = [feed.position(mark, between=epoch_over, may_be_left=several) for feed, mark in pairs]
            return Place(rng, None, at)
        if settled is None and self._first:  # the first step of an epoch is under way, and a batch or two are out
            firsts = [_after(feed, batches) for feed, batches in zip(feeds, self._first, strict=True)]
            return Place(rng, None, [feed.position(mark) for feed, mark in zip(feeds, firsts, strict=True)])
        notes = self._round.notes if settled is None else settled
        for feed in feeds:
            feed.name_large()
        return Place(rng, self._round.rng, [Position(note) if isinstance(note, Mark) else note for note in notes])

    @property
    def limits(self) -> list[tuple[str, str]]:
        """``(loader, sentence)`` for all that cannot be promised."""
        return [(type(feed.loader).__name__, limit) for feed in self.feeds for limit in feed.limits]


def _before_step(feed: Feed) -> Mark:
    """Where ``feed`` was before the first step of an epoch, which may be under way: its batch is to come once more."""
    mark = feed.mark
    taken = mark.batches > 0 and not mark.over and feed.is_within() is None
    return mark._replace(batches=mark.batches - 1) if taken else mark


def _after(feed: Feed, batches: int) -> Mark:
    """Where ``feed`` was after so many batches of this epoch; what it was ahead of that comes once more."""
    mark = feed.mark
    return mark if mark.batches == batches else mark._replace(batches=batches, over=False, last=0, checked=0)
