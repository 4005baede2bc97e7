"""Where a training loader is, as values that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nemologger.exact.loaders.drawn import Drawn
from nemologger.exact.loaders.earlier import renamed
from nemologger.exact.loaders.orders import Order
from nemologger.exact.program.owned import NOTHING, Values
from nemologger.exact.rng import RngState


@dataclass(frozen=True)
class Start:
    """The moment an epoch of a loader began: all that decides which batches follow.

    Attributes:
        rng: The global generators.
        owned: What its sampler kept.
        seed: For the generators of workers.
        order: What else decides about the order, see :func:`~nemologger.exact.loaders.orders.order_of`.
    """

    rng: RngState
    owned: Values
    seed: int
    order: Order | None = None

    def to_plain(self) -> dict[str, Any]:
        """As plain types."""
        return {"rng": self.rng.to_plain(), "owned": self.owned.to_plain(), "seed": self.seed, "order": self.order}

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Start:
        """What :meth:`to_plain` was made of."""
        rng, owned = RngState.from_plain(plain["rng"]), Values.from_plain(plain["owned"])
        return Start(rng, owned, plain["seed"], plain.get("order"))


class Mark(NamedTuple):
    """What is cheap to note with every batch: how many are out since when, and whether those were the last ones."""

    start: Start | None
    batches: int
    restarts: int
    over: bool
    last: int = 0  # the checksum of one of them, if they can only be found by loading them once more; or of one ahead
    checked: int = 0  # its number, from 1 on


FRESH = Mark(None, 0, 0, False)


class Position(NamedTuple):
    """All that is needed to bring a loader back.

    Attributes:
        mark: Which batch is next.
        state: The loader's own state, if it has one.
        at_start: Generators and counters of what decides about the next epoch: its sampler and generator.
        at_batch: Those of what changes with every batch: its dataset.
        earlier: Whether it is of a version that had other names for some of these.
        sizes: Those of what ``at_start`` has the place in, if that is to be brought back within an epoch; and how many
            batches are drawn ahead of training.
        ahead: These batches, as :class:`~nemologger.exact.loaders.drawn.Drawn` has them, and its ``rng``.
    """

    mark: Mark
    state: Any = None
    at_start: Values = NOTHING
    at_batch: Values = NOTHING
    earlier: bool = False
    sizes: list[int] | None = None
    ahead: dict[str, Any] | None = None

    def contents(self) -> list[Collection[str]]:
        """The paths of lists, dictionaries, arrays and tensors that are brought back."""
        start = NOTHING if self.mark.start is None else self.mark.start.owned
        return [values.contents or () for values in (start, self.at_start, self.at_batch)]

    def to_plain(self) -> dict[str, Any]:
        """As plain types."""
        start, batches, restarts, over, last, checked = self.mark
        return {
            "start": None if start is None else start.to_plain(),
            "batches": batches,
            "restarts": restarts,
            "over": over,
            "last": last,
            "checked": checked,
            "state": self.state,
            "at_start": self.at_start.to_plain(),
            "at_batch": self.at_batch.to_plain(),
            "sizes": self.sizes,
            "ahead": self.ahead,
        }

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Position:
        """What :meth:`to_plain` was made of."""
        start = None if plain["start"] is None else Start.from_plain(plain["start"])
        batches, last = plain["batches"], plain.get("last", 0)
        checked = plain.get("checked", batches)  # there was a checksum of each batch once
        mark = Mark(start, batches, plain["restarts"], plain["over"], last, checked)
        at_start, at_batch = (Values.from_plain(plain[name]) for name in ("at_start", "at_batch"))
        sizes, ahead = plain.get("sizes"), plain.get("ahead", {"ended": None})
        return Position(mark, plain["state"], at_start, at_batch, "last" not in plain, sizes, ahead)

    def drawn(self) -> Drawn:
        """What had been drawn, or loaded, when it was saved."""
        ahead, (*_, reach) = self.ahead or {}, self.sizes or [0]
        batches, rng, ended = ahead.get("batches"), ahead.get("rng"), ahead.get("ended", False)
        return Drawn(self.mark.checked, self.mark.last, batches, rng, reach, ended)

    def of_today(self, loader: Any) -> Position:
        """The same by the names of today."""
        if not self.earlier:
            return self
        at_start, at_batch, start = renamed(self.at_start, loader), renamed(self.at_batch, loader), self.mark.start
        if start is not None:
            start = replace(start, owned=renamed(start.owned, loader))
        return Position(self.mark._replace(start=start), self.state, at_start, at_batch)


def skipping(batches: int) -> Position:
    """Leave out so many batches of an epoch of which nothing else is known."""
    return Position(Mark(None, batches, 0, False))


def rescaled(position: Position, numerator: int, denominator: int) -> Position:
    """``position`` after as many samples, on another number of ranks."""
    mark = position.mark
    return position._replace(
        mark=mark._replace(batches=mark.batches * numerator // denominator, last=0), state=None, sizes=None, ahead=None
    )


def less(at_start: Values, at_batch: Values) -> Values:
    """``at_start`` without lists and arrays of a dataset that are saved with it."""
    saved = at_batch.contents or {}
    held = {path: value for path, value in (at_start.contents or {}).items() if of_dataset(path) not in saved}
    return replace(at_start, contents=held)


def of_dataset(path: str) -> str:
    """``path`` without the way through a sampler that was given the dataset."""
    before, found, name = path.partition(".data_source.")
    return f"dataset.{name}" if found and before in ("below", "sampler", "sampler.sampler") else path
