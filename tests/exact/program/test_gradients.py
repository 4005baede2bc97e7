"""Gradients that a later step may want."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from exact.runs import Case, Net, shuffled, train
from torch import nn

from nemologger.exact.program.gradients import keep_gradients, put_back_gradients
from nemologger.exact.values.plain_contents import CannotBeKeptError


def test_gradients_come_back_where_the_parameters_are_as_they_were():
    net, other = nn.Linear(2, 3), nn.Linear(2, 4)
    net.weight.grad = torch.ones(3, 2)
    plain = keep_gradients(net, 1000)
    put_back_gradients(other, plain)
    assert other.weight.grad is None
    net.weight.grad = None
    put_back_gradients(net, plain)
    assert torch.equal(net.weight.grad, torch.ones(3, 2))
    assert net.bias.grad is None


def test_what_is_not_kept_says_why():
    net = nn.Embedding(3, 2, sparse=True)
    assert keep_gradients(net, 1000, sharded=True) == keep_gradients(net, 1000)
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(CannotBeKeptError, match="is sparse"):
        keep_gradients(net, 1000)
    with pytest.raises(CannotBeKeptError, match="is sharded"):
        keep_gradients(net, 1000, sharded=True)


class Wide(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.wide = nn.Parameter(torch.zeros(2_200_000, 2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.note(self.loss(batch)) + self.wide.sum()
        self.manual_backward(loss)
        self.optimizers().step()


def test_those_that_are_too_large_are_named(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(Case(shuffled, Wide, steps=1), tmp_path, 1)
    (told,) = [record for record in caplog.records if "exact resume, gradients" in record.message]
    assert told.levelname == "INFO"
    assert "is too large" in told.message
