"""How long a rank may be silent."""

from __future__ import annotations

import math

from nemologger.watch.board import Section
from nemologger.watch.patience import Patience


def patience(**options) -> Patience:
    return Patience(**{"initial": 100.0, "steady": 50.0, "learn": True, "factor": 5.0, "floor": 6.0, **options})


def see(p: Patience, section: Section, seconds: float, times: int) -> list[bool]:
    return [p.saw(section, seconds) for _ in range(times)]


def test_what_has_not_been_seen_has_what_was_given():
    p = patience()
    assert p.timeout(Section.STEP) == 50.0
    assert all(p.timeout(section) == 100.0 for section in Section if section is not Section.STEP)
    assert patience(initial=None, steady=None).timeouts() == [math.inf] * len(Section)


def test_what_was_seen_often_enough_is_learned():
    p = patience()
    changes = see(p, Section.STEP, 2.0, 31) + see(p, Section.STEP, 1.0, 2)
    assert changes == [False] * 31 + [True, False]
    assert p.timeout(Section.STEP) == 10.0
    assert p.saw(Section.STEP, 4.0)
    assert p.timeout(Section.STEP) == 20.0
    see(p, Section.VALIDATION, 600.0, 3)
    assert p.timeout(Section.VALIDATION) == 3000.0  # longer than what was given: it was needed
    see(p, Section.EPOCH, 0.01, 3)
    assert p.timeout(Section.EPOCH) == 6.0  # the floor


def test_saving_has_what_was_given_or_more():
    p = patience()
    see(p, Section.CHECKPOINT, 0.01, 3)
    assert p.timeout(Section.CHECKPOINT) == 100.0  # a store may be stuck for longer than it ever was
    p.saw(Section.CHECKPOINT, 30.0)
    assert p.timeout(Section.CHECKPOINT) == 150.0


def test_start_and_end_are_never_learned():
    p = patience()
    assert not any(see(p, Section.START, 1.0, 99) + see(p, Section.END, 1.0, 99))
    assert p.timeout(Section.START) == p.timeout(Section.END) == 100.0


def test_nothing_is_learned_if_that_was_not_asked_for():
    p = patience(learn=False)
    assert not any(see(p, Section.STEP, 1.0, 99))
    p.add_plain({"step": {"longest": 1.0, "seen": 99}})
    assert p.timeout(Section.STEP) == 50.0


def test_it_goes_on_learning_in_the_next_life():
    first = patience()
    see(first, Section.STEP, 2.0, 40)
    see(first, Section.VALIDATION, 1.5, 2)
    second = patience()
    second.add_plain(first.to_plain())
    assert second.timeout(Section.STEP) == 10.0
    assert second.saw(Section.VALIDATION, 1.0)
    assert second.timeout(Section.VALIDATION) == 7.5


def test_restarts_double_what_was_learned_up_to_what_was_given():
    learned = {"step": {"longest": 2.0, "seen": 40}, "validation": {"longest": 60.0, "seen": 9}}
    timeouts = []
    for restarts in range(5):
        p = patience(restarts=restarts)
        p.add_plain(learned)
        timeouts.append((p.timeout(Section.STEP), p.timeout(Section.VALIDATION)))
    assert timeouts == [(10, 300), (20, 300), (40, 300), (50, 300), (50, 300)]
