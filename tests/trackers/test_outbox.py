"""A tracker that fails, hangs or is slow neither ends what is done beside it nor makes it wait."""

from __future__ import annotations

import copy
import logging
import threading
import time

import pytest

from nemologger.trackers import outbox
from nemologger.trackers.outbox import Outbox


@pytest.fixture(autouse=True)
def however_slow_the_machine_is(monkeypatch):
    monkeypatch.setattr(outbox, "PATIENCE", 60.0)
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE", 0.05)


class Store:
    """Takes what it is given, while it is there."""

    def __init__(self) -> None:
        self.there, self.taken, self.asked = True, [], 0

    def take(self, value: object) -> None:
        self.asked += 1
        if not self.there:
            raise ConnectionError("gone away")
        self.taken.append(value)


def said(caplog) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == outbox.log.name]


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(params=[True, False], ids=["beside", "here"])
def beside(request):
    return request.param


def test_what_is_put_is_done_when_put_returns(beside, caplog):
    store, box = Store(), Outbox("T", beside=beside)
    for value in range(5):
        box.put(f"{value}", lambda value=value: store.take(value))
        assert store.taken == [*range(value + 1)]
    box.finish()
    assert said(caplog) == []


def test_what_comes_while_it_is_gone_is_done_in_order_later(beside, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 3600.0)
    store, box = Store(), Outbox("T", beside=beside)
    store.there = False
    for value in range(5):
        box.put(f"{value}", lambda value=value: store.take(value))
    assert store.asked == 1  # a pause
    store.there = True
    box.finish()
    assert store.taken == [*range(5)]
    ((level, first), (_, last)) = said(caplog)
    assert level == "ERROR"
    assert first.startswith("T fails (0): ConnectionError: gone away. Training goes on")
    assert last == "T is left. Nothing is lost: it has what had waited."


def test_it_is_tried_again_after_a_while(beside, caplog):
    store, box = Store(), Outbox("T", beside=beside)
    store.there = False

    def comes_back() -> None:
        try:
            store.take(1)
        finally:
            store.there = True

    box.put("1", comes_back)
    if beside:
        until(lambda: store.taken)
    else:
        time.sleep(0.03)
    box.put("2", lambda: store.take(2))
    until(lambda: store.taken == [1, 2])
    until(lambda: "answers again" in caplog.text)
    box.finish()
    assert len(said(caplog)) == 2


def test_one_call_that_always_fails_does_not_stop_the_others(beside, caplog):
    store, box = Store(), Outbox("T", beside=beside)
    bad = Store()
    bad.there = False
    box.put("a bad value", lambda: bad.take(0))
    values = iter(range(1000))

    def put_one() -> bool:
        value = next(values)
        box.put(f"{value}", lambda: store.take(value))
        time.sleep(0.01)
        return bool(store.taken)

    until(put_one)
    box.finish()
    assert bad.asked == 3
    assert store.taken == [*range(next(values))]
    assert "T: gave up a bad value: ConnectionError: gone away" in caplog.text
    assert "1 calls are lost: a bad value" in caplog.text


def test_at_the_end_what_is_lost_is_said(beside, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 3600.0)
    store, box = Store(), Outbox("T", beside=beside)
    store.there = False
    for value in range(5):
        box.put(f"step {value}", lambda value=value: store.take(value))
    box.finish()
    assert store.asked == 3  # once when it was put, and two that failed at the end
    assert "T is left. 5 calls are lost: from step 0 to step 4" in caplog.text
    store.there = True
    box.put("later", lambda: store.take("later"))  # a second fit
    assert store.taken == ["later"]
    box.finish()


def test_one_that_hangs_is_waited_for_once(caplog, monkeypatch):
    monkeypatch.setattr(outbox, "PATIENCE", 0.1)
    store, box, answer = Store(), Outbox("T"), threading.Event()
    box.put("0", lambda: (answer.wait(60), store.take(0)))
    monkeypatch.setattr(outbox, "PATIENCE", 60.0)
    begun = time.monotonic()
    for value in range(1, 50):
        box.put(f"{value}", lambda value=value: store.take(value))
    assert time.monotonic() - begun < 30
    assert store.taken == []
    answer.set()
    box.finish()
    assert store.taken == [*range(50)]
    assert "T has not answered for 0 s (0). Training goes on" in said(caplog)[0][1]
    assert len(said(caplog)) == 2


def test_one_that_never_answers_does_not_keep_the_end_waiting(caplog, monkeypatch):
    monkeypatch.setattr(outbox, "PATIENCE", 0.05)
    box, answer = Outbox("T"), threading.Event()
    box.put("0", lambda: answer.wait(60))
    box.finish()
    assert "T is left. 1 calls are lost: 0" in caplog.text
    answer.set()


def test_no_more_than_so_many_calls_wait(beside, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(outbox, "MOST", 3)
    store, box = Store(), Outbox("T", beside=beside)
    store.there = False
    for value in range(10):
        box.put(f"{value}", lambda value=value: store.take(value))
    store.there = True
    box.finish()
    assert store.taken == [7, 8, 9]
    assert caplog.text.count("The oldest are lost") == 1
    assert "7 calls are lost: from 0 to 6" in caplog.text


def test_what_is_put_again_soon_does_not_wait(beside, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 3600.0)
    store, box = Store(), Outbox("T", beside=beside)
    store.there = False
    for _ in range(5):
        box.put("rows", lambda: store.take(0), repeatable=True)
    assert store.asked == 1
    assert len(said(caplog)) == 1
    box.put("the end", lambda: store.take(0))
    box.finish()


def test_its_thread_ends_when_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr(outbox, "_IDLE", 0.01)
    before = set(threading.enumerate())
    box, store = Outbox("T"), Store()
    for value in range(3):
        box.put("x", lambda value=value: store.take(value))
        until(lambda: set(threading.enumerate()) <= before)
    assert store.taken == [0, 1, 2]


def test_many_threads_may_log():
    store, box = Store(), Outbox("T")
    each = [threading.Thread(target=lambda: [box.put("x", lambda: store.take(1)) for _ in range(50)]) for _ in range(4)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    assert len(store.taken) == 200
    box.finish()


def test_a_copy_begins_empty(caplog):
    caplog.set_level(logging.ERROR)
    box, store = Outbox("T", beside=False), Store()
    store.there = False
    box.put("x", lambda: store.take(1))
    other = copy.deepcopy(box)
    store.there = True
    other.put("y", lambda: store.take(2))
    assert store.taken == [2]
