"""Checkpoints of earlier versions, in which what a collate_fn was made with had other names."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from torch.utils.data import DataLoader

from nemologger.exact.loaders.earlier import renamed
from nemologger.exact.program.owned import Owned, Values


class Collate:
    def __init__(self):
        self.rng, self.calls, self.seen = np.random.default_rng(1), 0, []

    def method(self, batch):
        return batch


def closure(collate):
    return lambda batch: collate.method(batch)


FUNCTIONS = {
    "object": (lambda collate: collate, "collate_fn"),
    "method": (lambda collate: collate.method, "collate_fn"),
    "closure": (closure, "collate_fn.0"),
    "partial": (lambda collate: partial(print, 1, collate), "collate_fn.2"),
    "partial of a method": (lambda collate: partial(collate.method, 1), "collate_fn.0"),
}


@pytest.mark.parametrize(("make", "holder"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_they_come_back(make, holder):
    collate = Collate()
    loader = DataLoader([0], collate_fn=make(collate))
    owned = Owned({"dataset": loader.dataset, "collate_fn": loader.collate_fn})
    collate.calls = 3
    collate.seen.append(4)
    now = owned.values()
    earlier = Values(
        {f"{holder}.rng": next(iter(now.generators.values()))},
        {f"{holder}.calls": 3},
        {f"{holder}.seen": next(iter((now.contents or {}).values()))},
    )
    assert renamed(earlier, loader) == now
