"""What a sampler has drawn of an epoch, and drawing that once more."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from nemologger.exact import port
from nemologger.exact.reach.look import Look
from nemologger.exact.rng import RngState, Streams, generator_state
from nemologger.exact.values import contents, plain_contents

log = logging.getLogger(__name__)

#: Of the batches that workers were told to load ahead so many bytes are saved at most.
_MOST = 2**16
_CHANGES = "exact resume, training loader %s: training changes in mid-epoch what its sampler draws by, and "
_WITHIN = ". One that draws the samples of an epoch when it begins goes on exactly"
_LARGE = (
    _CHANGES
    + "what its workers had been told to load ahead could not be saved: at most %d batches are drawn anew, which "
    "may be others" + _WITHIN
)
_REACH = (
    _CHANGES
    + "it draws %d batches ahead of training now, and drew %d then (num_workers times prefetch_factor): it draws "
    "later ones when it has been changed more, or less" + _WITHIN
)
_PLACE = (
    _CHANGES
    + "it does not draw again what it had drawn: if it left samples out by that, the run goes on at another place "
    "of their order, with other samples" + _WITHIN + ", and so does one that keeps its place among its attributes"
)


class Drawn(NamedTuple):
    """What had been drawn when a checkpoint was saved.

    Attributes:
        batches: So many, those that were told to workers ahead of training among them; 0 if that is not known.
        checksum: Of the last one; 0 if there is none.
        ahead: Those that training had not come to, as plain types; None if they can be drawn again, or not be saved.
        rng: The streams that the sampler drew from, as plain types.
        reach: So many batches are drawn ahead of training.
        ended: Whether the sampler had said that there are no more; None if nobody has noted it.
    """

    batches: int = 0
    checksum: int = 0
    ahead: Any = None
    rng: dict[str, Any] | None = None
    reach: int = 0
    ended: bool | None = False

    @staticmethod
    def of(plan: port.Plan, taken: int, reach: int) -> Drawn:
        """What has been drawn by ``plan``, of which training has taken so many."""
        number, index = plan.newest
        if index is None:
            return Drawn()
        told = number + 1 - taken
        waiting = [*list(plan.told)[len(plan.told) - told :], *plan.ahead] if told <= len(plan.told) else None
        last = plan.ahead[-1] if plan.ahead else index
        drawn = Drawn(number + 1 + len(plan.ahead), contents.of_batch(last), reach=reach, ended=plan.ended)
        if not isinstance(plan.streams, Streams) or waiting is None:  # a sampler of torch, which draws the same again
            return drawn
        with plan.streams:
            rng = RngState.capture().to_plain()
        try:
            return drawn._replace(ahead=plain_contents.keep(waiting, [_MOST]), rng=rng)
        except plain_contents.CannotBeKeptError:
            return drawn

    def again(self, indices: Iterator[Any], skip: int, roots: Mapping[str, Any], name: str, reach: int) -> list[Any]:
        """Draw as much from ``indices``, and return what is to be loaded first.

        Args:
            indices: Of an epoch that begins anew.
            skip: So many of its batches have been trained on.
            roots: The sampler.
            name: Of the loader.
            reach: So many batches it draws ahead now.
        """
        count = max(skip, self.batches)
        ahead = list(islice(indices, skip, count - 1)) if count > skip else []
        for _ in range(skip - 1 if count == skip else 0):
            next(indices, None)
        before = _generators(roots) if self.checksum else []
        last = list(islice(indices, min(count, 1)))
        ahead += last if count > skip else []
        if self.ended or (self.ended is None and 0 < self.batches < skip + reach):
            ahead += islice(indices, 1)
        saved = None if self.ahead is None else plain_contents.unkept(self.ahead)
        if self.checksum and last and contents.of_batch(last[0]) != self.checksum:
            if saved is None:
                log.warning(_LARGE, name, count - skip)
            elif reach != self.reach:
                log.warning(_REACH, name, reach, self.reach)
            elif before == _generators(roots):
                log.warning(_PLACE, name)
        if self.rng is not None:
            RngState.from_plain(self.rng).restore()
        return ahead if saved is None else saved


def _generators(roots: Mapping[str, Any]) -> list[Any]:
    """What tells whether something has been drawn from a generator."""
    own = Look(roots).generators.values()
    return [RngState.capture().seed(), *(str(generator_state(one)) for one in own)]
