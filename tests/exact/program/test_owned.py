"""What a dataset or a sampler keeps, and what of it is left as it is."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from nemologger.exact.program.owned import Owned, Values


class Replacing:
    """Makes other samples in a thread while an epoch lasts, and waits for it at the end, as MONAI's SmartCacheDataset."""

    def __init__(self):
        self.thread, self.round, self.done, self.positions, self.newest = None, 0, False, [0], None

    def start(self):
        self.round = 1
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        self._wait()

    def _work(self):
        seen = 0
        while self.round >= 0:
            if self.round != seen:
                self.positions[0], self.newest, seen, self.done = self.round, np.arange(3), self.round, True
            time.sleep(0.001)

    def _wait(self):
        until = time.monotonic() + 20
        while not self.done and time.monotonic() < until:
            time.sleep(0.001)
        return self.done

    def next(self):
        self.round, self.done = self.round + 1, False
        return self._wait()

    def stop(self):
        self.round = -1
        self.thread.join()


def test_what_a_thread_works_on_is_left_to_it_and_named():
    before, after = Replacing(), Replacing()
    owned, of_after = Owned({"dataset": before}), Owned({"dataset": after})
    try:
        before.start()
        before.done = False  # as it is for a moment
        values = Values.from_plain(owned.values().to_plain())
        after.start()
        of_after.restore(values, exactly=True)
        assert (after.round, after.done, after.positions) == (1, True, [1])  # what it waits for is still there
        assert after.next()
        assert {name for name in owned.lost if name.startswith("dataset.")} == {
            "dataset.round",
            "dataset.positions",
            "dataset.newest",
        }
    finally:
        before.stop()
        after.stop()


class Notes:
    """Notes what it draws, and perhaps where it has put that."""

    def __init__(self):
        self.noise = self.scales = self.files = self.gone = None

    def draw(self, files):
        self.noise, self.scales = np.arange(3.0), (1, 2.5)
        self.files = ["/tmp/of_this_life"] if files else None


@pytest.mark.parametrize("files", [False, True])
def test_numbers_that_were_not_there_at_first_come_back_unless_texts_are_with_them(files):
    before, after = Notes(), Notes()
    owned, of_after = Owned({"dataset": before}), Owned({"dataset": after})
    before.draw(files)
    after.gone = np.arange(2)
    of_after.restore(Values.from_plain(owned.values().to_plain()), exactly=True)
    assert after.files is after.gone is None
    assert owned.lost.keys() == ({"dataset.files", "dataset.noise", "dataset.scales"} if files else set())
    assert after.scales == (None if files else (1, 2.5))
    assert files or after.noise.tolist() == [0, 1, 2]


def test_a_dictionary_that_has_got_a_key_for_nothing():
    """As albumentations's transforms note the parameters that they have drawn, of which some are None."""
    before, after = SimpleNamespace(drawn={}), SimpleNamespace(drawn={})
    owned, of_after = Owned({"dataset": before}), Owned({"dataset": after})
    before.drawn |= {"padding": None, "angle": 0.5}
    of_after.restore(Values.from_plain(owned.values().to_plain()), exactly=True)
    assert after.drawn == {"padding": None, "angle": 0.5}
