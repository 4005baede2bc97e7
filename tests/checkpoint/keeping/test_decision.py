"""What a save writes, as a table."""

from __future__ import annotations

import pytest

from nemologger.checkpoint.keeping.decision import Decision, choose, choose_again
from nemologger.checkpoint.keeping.retention import Kept, Policy

BETTER = Kept("a", 1, 1.0, 0.1, ranked=True)


def _choose(score, last, *, name="b", kept=(BETTER,), k=1, **options):
    return choose(Policy(k), kept, Kept(name, 2, 2.0, score, ranked=True), save_last=last, **options)


@pytest.mark.parametrize(
    ("score", "last", "expected"),
    [
        (0.05, True, Decision("b", "b-last", 0.05, ranked=True)),
        (0.05, "link", Decision("b", "b-last", 0.05, ranked=True)),
        (0.05, False, Decision("b", None, 0.05, ranked=True)),
        (0.5, True, Decision("b-last", "b-last", 0.5, ranked=False)),
        (0.5, "link", Decision("b", "b-last", 0.5, ranked=False)),
        (0.5, False, None),
        (None, True, Decision("b-last", "b-last", None, ranked=False)),
        (None, "link", Decision("b", "b-last", None, ranked=False)),
        (None, None, None),
    ],
)
def test_by_score_and_kind_of_last(score, last, expected):
    assert _choose(score, last) == expected


def test_what_may_not_compete_is_only_last():
    assert _choose(0.05, True, rankable=False) == Decision("b-last", "b-last", 0.05, ranked=False)


@pytest.mark.parametrize(
    ("score", "last", "k", "path"),
    [
        (0.05, True, 1, "a"),  # the other one goes anyway
        (0.05, True, 2, "a-step=2"),
        (0.5, True, 2, "a-step=2"),
        (0.5, "link", 1, "a-step=2"),
        (0.5, True, 1, "a-last"),
        (0.5, False, -1, "a-step=2"),
    ],
)
def test_a_name_that_another_step_has(score, last, k, path):
    decision = _choose(score, last, name="a", k=k)
    assert decision is not None
    assert decision.path == path


def test_a_name_that_another_batch_of_the_step_has():
    """Where a program steps plain optimizers, all checkpoints are of step 0."""
    before = Kept("a", 0, 1.0, None, ranked=True, samples=8)
    now = Kept("a", 0, 2.0, None, ranked=True, samples=12)
    decisions = [choose(Policy(k, monitored=False), [before], now, save_last=False) for k in (1, 2)]
    assert [decision.path for decision in decisions if decision] == ["a", "a-consumed_samples=12"]


def test_a_name_that_a_step_has_which_came_after_more_samples():
    """A run that began anew, or went back, with batches of another size."""
    before = Kept("a", 10, 1.0, None, ranked=True, samples=80)
    now = Kept("a", 10, 2.0, None, ranked=True, life=1, samples=60)
    decision = choose(Policy(2, monitored=False), [before], now, save_last=False)
    assert decision == Decision("a", None, None, ranked=True)


def test_once_more():
    assert choose_again([BETTER], "a", 0.1, save_last=True) == Decision("a-last", "a-last", 0.1, ranked=False)
    assert choose_again([BETTER], "a", 0.1, save_last="link") == Decision("a", "a-last", 0.1, ranked=True)
    assert choose_again([BETTER], "c-last", 0.1, save_last=True) == Decision("c-last", "c-last", 0.1, ranked=False)
