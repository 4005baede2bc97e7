"""The objects that a save asks for many times are looked for once."""

from __future__ import annotations

from torch import nn

from nemologger.exact.program.holders import Holders


class Counter:
    def __init__(self) -> None:
        self.seen = 0


def test_what_comes_while_a_save_looks_is_seen_by_the_next_one():
    module = nn.Sequential(nn.Linear(2, 2))
    module.counter = Counter()
    holders = Holders({"module": module}, frozenset())
    with holders.at_rest():
        before = holders.all(), holders.with_generators()
        module.late, module.part = Counter(), nn.ReLU()
        assert (holders.all(), holders.with_generators()) == before
        assert holders.all()["module.counter"] is module.counter
    assert holders.all().keys() - before[0].keys() == {"module.late"}
