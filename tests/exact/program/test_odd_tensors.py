"""Modules with tensors that torch cannot save, or cannot load, as it does others."""

from __future__ import annotations

import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train
from torch import nn

from nemologger import load_weights
from nemologger.errors import CheckpointError


class Says(nn.Module):
    """Tells its state as bytes, more of them each time, as Transformer Engine does."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def get_extra_state(self):
        return torch.frombuffer(bytearray(b"x" * self.calls + b"end"), dtype=torch.uint8)

    def set_extra_state(self, state):
        self.calls = len(state) - 3


class Odd(Net):
    """Buffers that nothing can be copied to: one stays so, of one the program makes another."""

    def __init__(self):
        super().__init__()
        self.says = Says()
        self.register_buffer("row", torch.arange(4.0))
        self.register_buffer("rows", self.row.expand(3, 4))
        self.register_buffer("late", torch.zeros(1).expand(3))
        self.register_buffer("passing", torch.zeros(1).expand(3), persistent=False)
        with torch.inference_mode():
            self.register_buffer("guessed", torch.ones(2))

    def training_step(self, batch, batch_idx):
        self.says.calls += 1
        self.row.add_(1)
        self.late = self.late + torch.arange(3) * self.says.calls
        self.passing = self.passing + 1
        with torch.inference_mode():
            self.guessed.mul_(1.01)
        shown = self.rows.sum() + self.late.sum() + self.passing.sum() + self.guessed.clone().sum() + self.says.calls
        return self.note(self.loss(batch) * (1 + shown / 100))


def test_they_go_on_as_they_were(tmp_path):
    check(Case(shuffled, Odd, at=[7]), tmp_path)
    other = Odd()
    load_weights(tmp_path / "straight/step=7", other)
    assert (other.says.calls, other.late.tolist(), other.guessed[0] > 1) == (7, [0, 28, 56], True)
    assert other.rows.tolist() == [[7, 8, 9, 10]] * 3
    other.row.add_(1)
    assert other.rows.tolist() == [[8, 9, 10, 11]] * 3  # still the same memory


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def test_a_nested_attribute_is_named(tmp_path, caplog):
    class Nested(Net):
        def __init__(self):
            super().__init__()
            self.parts = nested()

        def on_train_batch_start(self, batch, batch_idx):
            self.parts = self.parts * 2

    train(Case(shuffled, Nested, steps=2), tmp_path, 1)
    assert "module.parts has changed since training began, and is not saved: it is a nested tensor" in caplog.text


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (nested, r"state_dict\.odd is a nested tensor"),
        (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.uint4), r"state_dict\.odd is of torch\.uint4"),
    ],
)
def test_what_could_not_come_back_is_refused_before_training(tmp_path, make, why):
    model = Net()
    model.register_buffer("odd", make())
    with pytest.raises(CheckpointError, match=why):
        train(Case(shuffled, lambda: model), tmp_path, 1)
    assert not model.losses
