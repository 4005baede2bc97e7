from __future__ import annotations

import io
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemologger.errors import DamagedCheckpointError
from nemologger.exact.program.owned import Owned
from nemologger.exact.rng import RngState, Streams, generator_from, generator_state, set_generator_state


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.normal(),
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def through_a_file(plain):
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_comes_back_from_plain_types():
    draw()  # half of a pair of normal numbers is kept for later
    state = RngState.capture()
    expected = [draw() for _ in range(3)]
    again = RngState.from_plain(through_a_file(state.to_plain()))
    again.restore()
    assert [draw() for _ in range(3)] == expected
    assert again.seed(1) == state.seed(1)


def test_numpys_generator_may_be_another_one():
    before = np.random.mtrand.get_bit_generator()
    try:
        np.random.mtrand.set_bit_generator(np.random.PCG64(3))
        state = RngState.from_plain(through_a_file(RngState.capture().to_plain()))
        expected = draw()
        state.restore()
        again = draw()
        assert (again[1], again[4]) == (expected[1], expected[4])
    finally:
        np.random.mtrand.set_bit_generator(before)


def test_seeds_differ_by_state_and_salt_and_draw_nothing():
    state = RngState.capture()
    seeds = {state.seed(rank, loader) for rank in range(4) for loader in range(4)}
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.rand(1)
    seeds.add(RngState.capture().seed(0, 0))
    assert len(seeds) == 17
    state.restore()
    assert RngState.capture().seed(5) == state.seed(5)


def test_streams_and_the_outside_do_not_disturb_each_other():
    def inside(streams: Streams, disturb: int) -> list[list[float]]:
        found = []
        for _ in range(3):
            with streams:
                found.append(draw())
            for _ in range(disturb):
                draw()
        return found

    RngState.capture().restore()
    expected, present = inside(Streams(7), 0), RngState.capture()
    assert inside(Streams(7), 2) == expected
    present.restore()
    inside(Streams(8), 0)
    outside = [random.random(), np.random.rand(), torch.rand(1).item()]
    present.restore()
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == outside


def test_streams_are_left_when_something_is_raised():
    state = RngState.capture()
    with pytest.raises(ZeroDivisionError), Streams(1):
        [draw(), 1 / 0]
    assert RngState.capture().seed() == state.seed()


def is_drawn_from(generator: np.random.BitGenerator) -> bool:
    """Whether another thread is drawing from it."""
    if generator.lock.acquire(blocking=False):
        generator.lock.release()
        return False
    return True


@pytest.fixture
def long_draw():
    """A thread that draws an array for a while: a function that starts it, and waits until it draws from a generator."""
    threads = []

    def start(generator: np.random.BitGenerator) -> None:
        while not is_drawn_from(generator):
            if not threads or not threads[-1].is_alive():  # it may have come to its end unseen
                threads.append(threading.Thread(target=np.random.standard_normal, args=(5_000_000,)))
                threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def test_a_thread_that_draws_is_waited_for_before_there_is_a_generator_of_another_kind(long_draw):
    """It would draw from the one as from the other, whose memory is larger."""
    before = np.random.mtrand.get_bit_generator()
    try:
        np.random.mtrand.set_bit_generator(outside := np.random.PCG64(3))
        streams = Streams(1)
        long_draw(outside)
        with streams:
            assert not is_drawn_from(outside)
            long_draw(streams.numpy)
        assert not is_drawn_from(streams.numpy)
    finally:
        np.random.mtrand.set_bit_generator(before)


def test_memory_that_a_thread_may_still_draw_from_is_given_to_nobody_else():
    def address() -> int:
        with (streams := Streams(1)):
            return id(streams.numpy)

    assert len({address() for _ in range(8)}) == 8


@pytest.mark.parametrize("place", [-1, 625, 10**9, "1"])
def test_a_place_that_numpys_generator_does_not_have_is_refused(place):
    plain = RngState.capture().to_plain()
    plain["numpy"]["state"]["pos"] = place
    with pytest.raises(DamagedCheckpointError, match=r"MT19937.*pos=.*expected 0 to 624"):
        RngState.from_plain(plain)


@pytest.mark.parametrize(
    ("generator", "name", "last"),
    [
        (np.random.Generator(np.random.Philox(1)), "buffer_pos", 4),
        (np.random.RandomState(1), "pos", 624),
        (np.random.Generator(np.random.MT19937(1)), "pos", 624),
    ],
)
def test_so_is_one_of_a_generator_of_ones_own(generator, name, last):
    state = generator_state(generator)
    (state if name in state else state["state"])[name] = last
    set_generator_state(generator, state)
    (state if name in state else state["state"])[name] = last + 1
    with pytest.raises(DamagedCheckpointError, match=f"{name}={last + 1}, expected 0 to {last}"):
        set_generator_state(generator, state)
    with pytest.raises(DamagedCheckpointError):
        generator_from(state)


def test_other_ranks_get_other_states():
    state = RngState.capture()
    others = [state.for_another_rank(rank) for rank in range(3)]
    found = []
    for other in others:
        other.restore()
        found.append(tuple(draw()))
    assert len(set(found)) == 3
    state.restore()


GENERATORS = [
    torch.Generator().manual_seed(2),
    random.Random(2),
    np.random.default_rng(2),
    np.random.RandomState(2),
    np.random.Generator(np.random.Philox(3)),
]


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda generator: type(generator).__name__)
def test_generators_of_ones_own(generator):
    def next_one(of) -> float:
        return torch.rand(1, generator=of).item() if isinstance(of, torch.Generator) else of.random()

    next_one(generator)
    state = through_a_file(generator_state(generator))
    expected = [next_one(generator) for _ in range(3)]
    set_generator_state(generator, state)
    assert [next_one(generator) for _ in range(3)] == expected
    again = generator_from(state)
    assert type(again) is type(generator)
    assert [next_one(again) for _ in range(3)] == expected


def test_bit_generators_of_other_libraries_have_states_of_other_forms():
    state = {"bit_generator": "Xoshiro256", "s": np.arange(4, dtype=np.uint64), "buffer_pos": 7}  # as randomgen's
    generator = SimpleNamespace(bit_generator=SimpleNamespace(state=state))
    plain = through_a_file(generator_state(generator))
    generator.bit_generator.state = None
    set_generator_state(generator, plain)
    back = generator.bit_generator.state
    assert {**back, "s": back["s"].tolist()} == {**state, "s": [0, 1, 2, 3]}


class Transform:
    def __init__(self):
        self.rng = random.Random(0)
        self.calls = 0


class Data:
    def __init__(self, size=5):
        self.size, self.epoch, self.note = size, 0, None
        self.transforms = [Transform(), Transform()]
        self.me = self
        self.table = list(range(1000))


def test_generators_and_changed_counters_are_found():
    data = Data()
    owned = Owned({"dataset": data, "other": None})
    assert owned.values().counters == {}
    data.epoch, data.transforms[1].calls, data.note = 3, 8, "x"
    data.transforms[0].rng.random()
    values = owned.values()
    assert values.counters == {"dataset.epoch": 3, "dataset.transforms.1.calls": 8, "dataset.note": "x"}
    assert set(values.generators) == {"dataset.transforms.0.rng", "dataset.transforms.1.rng"}

    other = Data(size=7)  # an argument that is another one today stays so
    Owned({"dataset": other}).restore(values)
    assert (other.size, other.epoch, other.transforms[1].calls, other.note) == (7, 3, 8, "x")
    assert other.transforms[0].rng.random() == data.transforms[0].rng.random()


def test_exactly_sets_back_what_has_changed_since():
    data = Data()
    owned = Owned({"dataset": data})
    values = owned.values()
    data.epoch = 9
    owned.restore(values)
    assert data.epoch == 9
    owned.restore(values, exactly=True)
    assert data.epoch == 0
