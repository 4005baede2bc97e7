"""What a run that goes on begins with, and the run before it did not: other data, and what a program makes by chance."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nemologger.callbacks.fit_state import FitState
from nemologger.callbacks.not_exact import Notices
from nemologger.exact.loaders.session import Place, Session
from nemologger.exact.program.built import Built, changed
from nemologger.exact.program.made import Made, made_otherwise, without

log = logging.getLogger("nemologger.callbacks.exact_resume")

_OTHER_DATA = (
    "the training data is not what it was when the checkpoint was saved (%s): the run cannot go on "
    "exactly, and leaves out as many batches of the epoch as were trained on. What is drawn when data are made "
    "needs a fixed seed: a random_split a generator, the rest of a setup() a call of lightning.seed_everything"
)

_MADE_OTHERWISE = (
    "is not what it was when the run began: it holds other numbers, or the same names in another order, and no checkpoint "
    "has it. What is drawn before training needs a seed (lightning.seed_everything); what goes through a set() of names "
    "must be sorted(), as Python draws their order for each process. A tensor may be a buffer (register_buffer). It is no "
    "matter where training does not use it, or writes to it first, as to what empty() makes"
)

_OTHER_PROCESS = (
    "its samples were loaded {} before, and are loaded {} now: what the dataset draws from torch, numpy.random or random, "
    "if it does, it draws in another way, and training goes on with other numbers. Any num_workers but 0 draws the same"
)

_BUILT_OTHERWISE = (
    "goes on with what the checkpoint has of it, and this program has otherwise: {}. For a run with the program's "
    "start a new one from the weights with RestoreConfig"
)

_CHECKSUMS = {
    "chosen": "other samples are chosen (Subset, random_split)",
    "content": "the dataset holds other values in memory",
}


def say_made_otherwise(then: Made, now: Made, notices: Notices) -> None:
    """Say of attributes, as :class:`RankState` has them, what is made in another way now."""
    for path in made_otherwise(then, now):
        notices.say(f"attribute {path}", _MADE_OTHERWISE)


def say_built_otherwise(then: Built, now: Built, notices: Notices) -> None:
    """Say of optimizers and schedules what the program has changed, in vain."""
    for what, values in changed(then, now):
        notices.say(what, _BUILT_OTHERWISE.format(values))


def say_other_data(session: Session, then: FitState, place: Place, notices: Notices) -> None:
    """Say what the training loaders read that is not what they read ``then``.

    Args:
        session: The loaders.
        then: The checkpoint.
        place: Where they go on. What it brings back does not count.
        notices: Who says it.
    """
    for feed, names, position in zip(session.feeds, then.names, place.positions, strict=False):
        for path in made_otherwise(without(names, *position.contents()), feed.names):
            notices.say(f"training loader {type(feed.loader).__name__}: {path}", _MADE_OTHERWISE)
    for feed, workers in zip(session.feeds, then.workers, strict=False):
        if workers != feed.has_workers:
            before, after = ("by workers", "without") if workers else ("without workers", "by some")
            notices.say(f"training loader {type(feed.loader).__name__}:", _OTHER_PROCESS.format(before, after))
    now = [feed.data for feed in session.feeds]
    if then.data and then.data != now:  # none yet in what LearningRateFinder and the like put back before a fit
        log.warning(_OTHER_DATA, _differences(then.data, now))


def _differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """What has changed of the data of training loaders, as :attr:`nemologger.exact.loaders.feed.Feed.data` has it."""
    if len(before) != len(now):
        return f"training loaders: {len(before)} -> {len(now)}"
    found = []
    for number, (then, today) in enumerate(zip(before, now, strict=True)):
        where = f"loader {number}, " if len(now) > 1 else ""
        for key in today.keys() | then.keys():
            if then.get(key) != today.get(key):
                found.append(where + _CHECKSUMS.get(key, f"{key}: {then.get(key)} -> {today.get(key)}"))
    return "; ".join(sorted(found))
