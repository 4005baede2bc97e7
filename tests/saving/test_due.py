"""When a checkpoint is due."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from nemologger.ranks import SingleProcess
from nemologger.saving import due
from nemologger.saving.due import Due


@given(every=st.integers(1, 7), begin=st.integers(0, 20), taken=st.lists(st.integers(0, 9), max_size=30))
def test_each_multiple_that_is_come_to_or_passed_is_due_once(every, begin, taken):
    """A batch may take no step, one, or several."""
    one, step = Due(every, None, 0), begin
    one.begin((begin, 0))
    for steps in taken:
        passed = [multiple for multiple in range(step + 1, step + steps + 1) if multiple % every == 0]
        step += steps
        assert one.at_step((step, 0)) == bool(passed)


def test_the_first_step_that_is_counted_begins_anew():
    """Until then batches are counted."""
    one = Due(2, None, 0)
    steps = enumerate((0, 0, 0, 1, 1, 2, 2), start=1)
    assert [one.at_step((step, batch)) for batch, step in steps] == [False, True, False, False, False, True, False]
    each = Due(1, None, 0)
    steps = enumerate(
        (0, 1, 1, 2), start=1
    )  # the first step comes with the second batch: as many as there were batches before
    assert [each.at_step((step, batch)) for batch, step in steps] == [True, True, False, True]


def test_nothing_is_due_that_was_not_asked_for():
    one = Due(0, None, 0)
    assert not any(one.at_step((step, step)) or one.at_epoch(step) for step in range(10))
    assert not one.has_clock
    assert not one.at_this_time(SingleProcess())


def test_epochs_are_counted_from_one():
    one = Due(0, None, 3)
    assert [epoch for epoch in range(9) if one.at_epoch(epoch)] == [2, 5, 8]


def test_a_span_begins_anew_when_it_is_over_and_when_training_begins(monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(due, "time", clock)
    one, alone = Due(0, timedelta(seconds=10), 0), SingleProcess()
    assert one.has_clock
    clock.now = 105.0
    one.begin((0, 0))
    for now, is_due in ((114.0, False), (116.0, True), (125.0, False), (126.0, True)):
        clock.now = now
        assert one.at_this_time(alone) == is_due


def test_all_ranks_do_what_the_first_ones_clock_says():
    ranks = SimpleNamespace(broadcast=lambda mine: not mine)
    assert Due(0, timedelta(hours=1), 0).at_this_time(ranks)
    assert not Due(0, timedelta(0), 0).at_this_time(ranks)


def test_by_hand_gradients_are_gathered_until_a_batch_takes_a_step():
    module, loop = SimpleNamespace(automatic_optimization=False), SimpleNamespace(_can_stop_early=True)
    trainer = SimpleNamespace(lightning_module=module, fit_loop=loop, should_stop=False)
    one = Due(0, None, 0)
    one.begin((4, 4))
    for batch, (step, gathers) in enumerate([(4, True), (5, False), (5, True), (7, False), (7, True)], start=5):
        one.at_step((step, batch))
        assert one.is_accumulating(trainer) == gathers
    trainer.should_stop = True  # there may be no further step
    assert not one.is_accumulating(trainer)
