"""What stays and what may go: pure decisions over values (contract C2).

Nothing here deletes. The callback asks before a save whether the new checkpoint enters the best ``k``, and, once it is
published, which of the earlier ones are surplus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """A published checkpoint, as far as keeping it goes.

    Attributes:
        path: Where it is.
        step: Its optimizer step.
        time: When it was saved, seconds since 1970.
        score: The monitored metric, or None without one.
        ranked: Whether it competes for the best ``k``.
        last: Whether it is a ``-last`` that stands by itself.
        life: Which line of training it belongs to.
        origin: The life that began from scratch and has led to it.
        has_optimizer: Whether training can go on from it.
        samples: Training samples seen until then.
    """

    path: str
    step: int
    time: float
    score: float | None
    ranked: bool
    last: bool = False
    life: int = 0
    origin: int = 0
    has_optimizer: bool = True
    samples: int = 0

    @property
    def order(self) -> tuple[int, int, int, float]:
        """Newest last: see :attr:`nemologger.checkpoint.manifest.Manifest.order`."""
        return self.life, self.step, self.samples, self.time

    @property
    def moment(self) -> tuple[int, int]:
        """When in a line of training it was taken: where no step is counted, samples tell."""
        return self.step, self.step or self.samples


@dataclass(frozen=True)
class Policy:
    """What the user asked to keep.

    Attributes:
        top_k: How many of the best; -1 all, 0 none.
        mode: ``"min"`` or ``"max"``: which scores are better.
        monitored: Whether there is a metric; without one the newest are the best.
        states: How many of the newest keep their optimizer state; -1 all.
    """

    top_k: int
    mode: str = "min"
    monitored: bool = True
    states: int = -1

    def merit(self, kept: Kept) -> tuple[float, ...]:
        """Higher is better. A nan is worse than any number; of equals the older is better.

        Scores of one training are compared, from its start from scratch on, however often it was resumed. What another one
        has left in the directory is behind: it may be of another model.
        """
        if not self.monitored:
            return (*kept.order, 0.0)
        score = math.nan if kept.score is None else kept.score
        age = tuple(-part for part in kept.order)  # by time alone, a clock that is set back would change what is kept
        if math.isnan(score):
            return kept.origin, 0.0, 0.0, *age
        return kept.origin, 1.0, -score if self.mode == "min" else score, *age

    def ranking(self, kept: Iterable[Kept]) -> list[Kept]:
        """The checkpoints that compete, the best first."""
        return sorted((k for k in kept if k.ranked), key=self.merit, reverse=True)

    def admits(self, candidate: Kept, kept: Iterable[Kept]) -> bool:
        """Whether ``candidate`` would be among the best ``k``."""
        if self.top_k == -1:
            return True
        rivals = [k for k in kept if (k.path, k.moment) != (candidate.path, candidate.moment)]
        return candidate in self.ranking([*rivals, candidate])[: self.top_k]

    def surplus(self, kept: Sequence[Kept], last: str | None) -> list[Kept]:
        """What is neither among the best ``k`` nor needed by ``last``, the path that ``-last`` is or points to."""
        best = self.ranking(kept) if self.top_k == -1 else self.ranking(kept)[: self.top_k]
        stays = {k.path for k in best} | {last}
        going = [k for k in kept if k.path not in stays]
        if len(going) == len(kept):  # the only complete one stays, whatever was asked
            going = [k for k in going if k is not max(kept, key=lambda k: k.order)]
        return going

    def thinned(self, kept: Iterable[Kept]) -> list[Kept]:
        """What gives up its optimizer state: all but the newest, and never a ``-last`` or what is as new as the newest."""
        if self.states == -1:
            return []
        holders = sorted((k for k in kept if k.has_optimizer), key=lambda k: k.order)
        newest = [(k.life, k.moment) for k in holders[-1:]]
        own = [k for k in holders if not k.last]
        return [k for k in own[: max(len(own) - self.states, 0)] if (k.life, k.moment) not in newest]
