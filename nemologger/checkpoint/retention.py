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
        has_optimizer: Whether training can go on from it.
    """

    path: str
    step: int
    time: float
    score: float | None
    ranked: bool
    last: bool = False
    life: int = 0
    has_optimizer: bool = True


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

    def merit(self, kept: Kept) -> tuple[float, float, float]:
        """Higher is better. A nan is worse than any number; of equals the older is better."""
        if not self.monitored:
            return 0.0, float(kept.step), kept.time
        score = math.nan if kept.score is None else kept.score
        if math.isnan(score):
            return 0.0, 0.0, -kept.time
        return 1.0, -score if self.mode == "min" else score, -kept.time

    def ranking(self, kept: Iterable[Kept]) -> list[Kept]:
        """The checkpoints that compete, the best first."""
        return sorted((k for k in kept if k.ranked), key=self.merit, reverse=True)

    def admits(self, candidate: Kept, kept: Iterable[Kept]) -> bool:
        """Whether ``candidate`` would be among the best ``k``."""
        if self.top_k == -1:
            return True
        rivals = [k for k in kept if (k.path, k.step) != (candidate.path, candidate.step)]
        return candidate in self.ranking([*rivals, candidate])[: self.top_k]

    def surplus(self, kept: Sequence[Kept], last: str | None) -> list[Kept]:
        """What is neither among the best ``k`` nor needed by ``last``, the path that ``-last`` is or points to."""
        best = self.ranking(kept) if self.top_k == -1 else self.ranking(kept)[: self.top_k]
        stays = {k.path for k in best} | {last}
        going = [k for k in kept if k.path not in stays]
        if len(going) == len(kept):  # the only complete one stays, whatever was asked
            going = [k for k in going if k is not max(kept, key=lambda k: (k.step, k.time))]
        return going

    def thinned(self, kept: Iterable[Kept]) -> list[Kept]:
        """What gives up its optimizer state: all but the newest, and never a ``-last`` or what is as new as the newest."""
        if self.states == -1:
            return []
        holders = sorted((k for k in kept if k.has_optimizer), key=lambda k: (k.life, k.step, k.time))
        newest = [(k.life, k.step) for k in holders[-1:]]
        own = [k for k in holders if not k.last]
        return [k for k in own[: max(len(own) - self.states, 0)] if (k.life, k.step) not in newest]
