"""How many samples a batch holds."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from nemologger.saving.batches import batch_size

Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    name: str
    tokens: torch.Tensor


x = torch.zeros(4, 7)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (x, 4),
        ([x, torch.zeros(4)], 4),
        ((x, torch.zeros(4)), 4),
        (Pair(x, torch.zeros(4)), 4),
        ({"tokens": x, "mask": x}, 4),
        ({"ids": ["a", "b", "c", "d"], "tokens": x}, 4),
        ({"deep": [{"tokens": x}]}, 4),
        (OrderedDict(tokens=x), 4),
        (UserDict(tokens=x), 4),
        (Sample("a", x), 4),
        (Namespace(tokens=x), 4),
        (torch.tensor(3.0), 1),
        (torch.zeros(0, 7), 0),
        (["a", "b", "c"], 3),
        ([1, 2], 2),
        ([["a", "b"], [0, 1]], 2),
        ((["a", "b", "c"], [0, 1, 2]), 3),
        ({"text": ["a", "b"]}, 2),
        ({"text": "abc"}, 1),
        ("abc", 1),
        (b"abc", 1),
        (None, 1),
        ([], 1),
        ({}, 1),
        (3, 1),
        (object(), 1),
        (torch.Tensor, 1),
    ],
)
def test_it_is_the_first_dimension_of_the_first_tensor(batch, size):
    assert batch_size(batch) == size
