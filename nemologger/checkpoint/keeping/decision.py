"""What a save writes, and under which name: a pure decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nemologger import names
from nemologger.checkpoint.keeping.retention import Kept, Policy


@dataclass(frozen=True)
class Decision:
    """What is to be saved.

    Attributes:
        path: The directory to write.
        last: The ``-last`` to publish with it: another directory, a link, ``path`` itself, or None.
        score: The monitored metric, if there is one.
        ranked: Whether it competes for the best k.
        replaces: A checkpoint of the same name, to be removed once this one is published; "" where that goes without saying.
    """

    path: str
    last: str | None
    score: float | None
    ranked: bool
    replaces: str = ""


def choose(
    policy: Policy,
    kept: Sequence[Kept],
    candidate: Kept,
    *,
    save_last: bool | Literal["link"] | None,
    rankable: bool = True,
) -> Decision | None:
    """What to write of this moment; None if nothing of it is to be kept.

    Args:
        policy: How many of the best are kept.
        kept: What is kept already.
        candidate: This moment, under the name that the template gives it.
        save_last: Whether there is a ``-last``, and of which kind.
        rankable: Whether it may compete at all.
    """
    known = not policy.monitored or candidate.score is not None
    ranked = rankable and known and policy.admits(candidate, kept)
    taken = _has_the_name(policy, kept, candidate, ranked=ranked, written=ranked or save_last == "link")
    if taken is not None:
        other = f"step={candidate.step}" if taken.step != candidate.step else f"consumed_samples={candidate.samples}"
        candidate = replace(candidate, path=f"{candidate.path}-{other}")
    return _decision(candidate, ranked=ranked, save_last=save_last)


def choose_again(
    kept: Sequence[Kept], saved: str, score: float | None, *, save_last: bool | Literal["link"] | None
) -> Decision | None:
    """What to write when a step that was ``saved`` under this path is saved once more, for a final ``-last``."""
    path = saved.removesuffix(names.LAST)
    ranked = save_last == "link" and any(k.path == path and k.ranked for k in kept)
    return _decision(Kept(path, 0, 0.0, score, ranked), ranked=ranked, save_last=save_last)


def _decision(candidate: Kept, *, ranked: bool, save_last: bool | Literal["link"] | None) -> Decision | None:
    if not save_last:
        return Decision(candidate.path, None, candidate.score, ranked=True) if ranked else None
    last = candidate.path + names.LAST
    if ranked or save_last == "link":
        return Decision(candidate.path, last, candidate.score, ranked)
    return Decision(last, last, candidate.score, ranked=False)


def _has_the_name(policy: Policy, kept: Sequence[Kept], candidate: Kept, *, ranked: bool, written: bool) -> Kept | None:
    """The checkpoint of another moment that has the candidate's name, and is to stay."""
    if not written:
        return None
    ranking = policy.ranking([*kept, candidate] if ranked else kept)
    stays = ranking if policy.top_k == -1 else ranking[: policy.top_k]
    return next((k for k in stays if k.path == candidate.path and k.moment != candidate.moment), None)
