from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemologger.exact import unchanged
from nemologger.exact.rng import RngState, Streams

_EARLIER: list[RngState] = []
_STREAMS = Streams(3)


def go_back() -> None:
    if _EARLIER:
        _EARLIER[len(_EARLIER) // 2].restore()


def draw_apart() -> None:
    with _STREAMS:
        random.random()
        np.random.randn()


ACTIONS: dict[str, Callable[[], object]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.shuffle([1, 2, 3]),
    "seed": lambda: random.seed(5),
    "numpy": np.random.rand,
    "normal": np.random.randn,
    "binomial": lambda: np.random.binomial(10, 0.3),
    "numpy seed": lambda: np.random.seed(5),
    "another numpy generator": lambda: np.random.mtrand.set_bit_generator(np.random.PCG64(3)),
    "numpy's own": lambda: np.random.mtrand.set_bit_generator(np.random.MT19937(4)),
    "apart": draw_apart,
    "keep": lambda: _EARLIER.append(RngState(random.getstate(), np.random.get_state(legacy=False), NOW.torch)),
    "back": go_back,
    "nothing": lambda: None,
}
NOW = RngState.capture()


def assert_are_those_of_now() -> None:
    assert unchanged.python_state() == random.getstate()
    ours, theirs = unchanged.numpy_state(), np.random.get_state(legacy=False)
    np.testing.assert_equal(ours, theirs)


@given(st.lists(st.sampled_from(sorted(ACTIONS)), max_size=12))
def test_a_state_is_that_of_this_moment_whatever_was_done(actions):
    before = np.random.mtrand.get_bit_generator()
    _EARLIER.clear()
    random.seed(1)
    np.random.seed(1)
    try:
        for action in actions:
            ACTIONS[action]()
            assert_are_those_of_now()
    finally:
        np.random.mtrand.set_bit_generator(before)


def test_half_of_a_pair_of_normal_numbers_counts():
    np.random.seed(1)
    np.random.randn()
    with_half = np.random.get_state(legacy=False)
    assert unchanged.numpy_state()["has_gauss"] == 1
    np.random.randn()
    assert unchanged.numpy_state()["has_gauss"] == 0
    np.random.set_state(with_half)
    assert unchanged.numpy_state()["has_gauss"] == 1


@pytest.mark.skipif(not unchanged._HAS_ADDRESSES, reason="elsewhere states are always asked for")
def test_what_has_not_changed_is_not_asked_for_again():
    np.random.seed(1)  # no half of a pair, which leaves with numpy's generator
    state, of_numpy = unchanged.python_state(), unchanged.numpy_state()
    streams = Streams(7)
    for _ in range(3):
        with streams:
            pass
        assert unchanged.python_state() is state
        assert unchanged.numpy_state() is of_numpy


def test_who_replaces_pythons_or_numpys_functions_is_asked(monkeypatch):
    other, others = random.Random(9), np.random.RandomState(9)
    monkeypatch.setattr(random, "getstate", lambda: other.getstate())
    monkeypatch.setattr(np.random, "get_state", lambda legacy: others.get_state(legacy=legacy))
    for _ in range(2):
        other.random()
        others.rand()
        assert_are_those_of_now()
