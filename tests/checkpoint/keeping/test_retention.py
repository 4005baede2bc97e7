"""What stays: the best k by their scores, what ``-last`` needs, and never nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemologger.checkpoint.keeping.retention import Kept, Policy

NAN, INF = math.nan, math.inf

scores = st.one_of(st.sampled_from([NAN, INF, -INF, 0.0, 1.0, 1.0, 2.0]), st.floats(-5, 5))


def kept(step: int, score: float | None, *, path: str | None = None, ranked: bool = True, last: bool = False) -> Kept:
    return Kept(path or f"step={step}", step, 1000.0 + step, score, ranked, last)


def order(scored: list[tuple[int, float]], mode: str) -> list[int]:
    """The oracle: steps, the best first; nan behind every number, the older first of equals."""

    def place(one: tuple[int, float]) -> tuple:
        step, score = one
        if math.isnan(score):
            return (1, 0.0, step)
        return (0, score if mode == "min" else -score, step)

    return [step for step, _ in sorted(scored, key=place)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(scores, min_size=1, max_size=15),
    st.sampled_from(["min", "max"]),
    st.sampled_from([-1, 0, 1, 3]),
    st.data(),
)
def test_any_sequence_of_saves_leaves_exactly_the_promised(sequence, mode, k, data):
    """Save after save, as the callback does: ask, publish ``-last``, remove what is surplus."""
    policy = Policy(k, mode)
    held: list[Kept] = []
    link = data.draw(st.booleans())
    for step, score in enumerate(sequence):
        new = kept(step, score)
        admitted = policy.admits(new, held)
        if link:
            held.append(new if admitted else kept(step, score, ranked=False))
            last = f"step={step}"
        else:
            held += [new] if admitted else []
            held.append(kept(step, score, path=f"step={step}-last", ranked=False, last=True))
            last = f"step={step}-last"
        going = policy.surplus(held, last)
        assert last not in {one.path for one in going}
        held = [one for one in held if one not in going]
        assert held
        scored = list(enumerate(sequence[: step + 1]))
        best = order(scored, mode)
        promised = {f"step={s}" for s in (best if k == -1 else best[:k])} | {last}
        assert {one.path for one in held} == promised


@settings(max_examples=100, deadline=None)
@given(st.lists(scores, min_size=1, max_size=10), st.sampled_from(["min", "max"]), st.sampled_from([1, 3]))
def test_without_last_the_best_stay(sequence, mode, k):
    policy = Policy(k, mode)
    held: list[Kept] = []
    for step, score in enumerate(sequence):
        new = kept(step, score)
        if policy.admits(new, held):
            held.append(new)
            going = policy.surplus(held, None)
            held = [one for one in held if one not in going]
    assert {one.step for one in held} == set(order(list(enumerate(sequence)), mode)[:k])


@settings(max_examples=100, deadline=None)
@given(st.lists(scores, min_size=1, max_size=8), st.sampled_from([-1, 0, 1, 3]), st.booleans(), st.data())
def test_the_only_complete_one_never_goes(sequence, k, ranked, data):
    """Whatever is asked, and whatever earlier lives left."""
    held = [kept(step, score, ranked=ranked) for step, score in enumerate(sequence)]
    last = data.draw(st.sampled_from([None, "gone", held[0].path]))
    going = Policy(k).surplus(held, last)
    assert len(going) < len(held)
    if len(held) - len(going) == 1 and k == 0 and last != held[0].path:
        assert max(held, key=lambda one: one.step) not in going


def test_without_a_metric_the_newest_stay():
    policy = Policy(2, monitored=False)
    held = [kept(step, None) for step in range(5)]
    assert [one.step for one in policy.ranking(held)] == [4, 3, 2, 1, 0]
    assert [one.step for one in policy.surplus(held, None)] == [0, 1, 2]
    assert policy.admits(kept(5, None), held)


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("min", [2.0, 1.0, 3.0], [1, 0, 2]),
        ("max", [2.0, 1.0, 3.0], [2, 0, 1]),
        ("min", [NAN, INF, -INF, 5.0], [2, 3, 1, 0]),
        ("max", [NAN, INF, -INF, 5.0], [1, 3, 2, 0]),
        ("min", [1.0, 1.0, 1.0], [0, 1, 2]),
        ("max", [NAN, NAN], [0, 1]),
    ],
)
def test_the_ranking(mode, scores, best):
    held = [kept(step, score) for step, score in enumerate(scores)]
    assert [one.step for one in Policy(3, mode).ranking(held)] == best


def test_a_score_that_is_not_there_yet_counts_as_nan():
    assert [one.step for one in Policy(3).ranking([kept(0, None), kept(1, NAN), kept(2, 9.0)])] == [2, 0, 1]


@pytest.mark.parametrize("score", [1.0, NAN])
def test_a_clock_that_is_set_back_makes_none_older(score):
    later = [replace(kept(step, score), time=1000.0 - step) for step in (1, 2, 3)]
    assert [one.step for one in Policy(2).ranking(later)] == [1, 2, 3]
    assert [one.step for one in Policy(2).surplus(later, None)] == [3]


def test_an_equal_score_does_not_push_out_an_older_one():
    assert not Policy(1).admits(kept(1, 0.5), [kept(0, 0.5)])


def test_another_step_of_the_same_name_is_a_rival():
    old = kept(3, 0.5, path="best")
    assert not Policy(1).admits(Kept("best", 4, 2000.0, 0.9, ranked=True), [old])
    assert Policy(1).admits(Kept("best", 4, 2000.0, 0.1, ranked=True), [old])
    assert Policy(1).admits(Kept("best", 3, 2000.0, 0.5, ranked=True), [old])  # the same step again


def test_a_last_is_no_rival():
    last = kept(9, 0.0, path="step=9-last", ranked=False, last=True)
    assert Policy(1).admits(kept(10, 5.0), [last])


@pytest.mark.parametrize(
    ("states", "thinned"),
    [(-1, set()), (0, {"step=1", "step=2", "step=3"}), (1, {"step=1", "step=2"}), (3, set()), (9, set())],
)
def test_the_newest_keep_their_optimizer_state_and_last_is_not_counted(states, thinned):
    held = [kept(step, step % 2) for step in (3, 1, 2)] + [kept(4, 0.0, path="step=4-last", ranked=False, last=True)]
    assert {one.path for one in Policy(-1, states=states).thinned(held)} == thinned


def test_the_newest_of_all_keeps_its_optimizer_state_whatever_is_asked():
    same = [kept(2, 0.0), kept(2, 0.0, path="step=2-last", ranked=False, last=True)]
    assert Policy(1, states=0).thinned([*same, kept(1, 0.0)]) == [kept(1, 0.0)]
    assert Policy(1, states=0).thinned(same) == Policy(1, states=0).thinned([kept(1, 0.0)]) == []
    assert Policy(1, states=0).thinned([]) == []


def test_of_a_run_that_went_back_the_latest_line_of_training_is_the_newest():
    back = Kept("step=2", 2, 5.0, None, ranked=True, life=1)
    assert Policy(-1, states=1).thinned([kept(9, None), back]) == [kept(9, None)]


def test_what_has_no_optimizer_state_is_not_counted():
    """A run has ended without: the newest that it can be continued from stays so."""
    bare = Kept("step=3", 3, 1003.0, None, ranked=True, has_optimizer=False)
    assert Policy(-1, states=1).thinned([kept(1, None), kept(2, None), bare]) == [kept(1, None)]
    assert Policy(-1, states=0).thinned([kept(1, None), bare]) == []
