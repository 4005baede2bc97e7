"""Something done beside training."""

from __future__ import annotations

import threading

import pytest
from processes import wait_for

from nemologger.checkpoint.keeping import errand
from nemologger.checkpoint.keeping.errand import Errand


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(errand, "_PAUSE", 0.0)


def test_it_is_asked_again_until_it_is_done_and_says_so_once():
    answers = iter([False, False, True])
    one = Errand(lambda: next(answers), "answers")
    wait_for(one.poll)
    assert not one.poll()
    assert not one.wait()
    assert next(answers, None) is None


def test_nobody_waits_for_it_who_does_not_want_to():
    go = threading.Event()
    one = Errand(lambda: go.wait(30), "a word")
    assert not one.poll()
    assert not one.poll()
    assert not one.wait(seconds=0.01)
    go.set()
    assert one.wait()


def test_its_error_is_raised_where_it_is_asked_after():
    def fail() -> bool:
        raise OSError("gone")

    one = Errand(fail, "nothing")
    one.poll()
    with pytest.raises(OSError, match="gone"):
        one.wait()
    assert not one.wait()
    one.poll()
    with pytest.raises(OSError, match="gone"):
        wait_for(one.poll)
