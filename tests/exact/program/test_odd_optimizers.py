"""Optimizers whose state is more than tensors as the parameters are, as those of many libraries."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train

from nemologger.checkpoint.reading.load import open_checkpoint


class Odd(torch.optim.Optimizer):
    """Keeps a matrix by columns, the last three gradients, a text, and a list in more digits than the parameters."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["basis"] = torch.zeros(3, 2).T
                state["last"] = deque(maxlen=3)
                state["phase"] = "warm"
                state["sums"] = [torch.zeros(1, dtype=torch.float64)]
            state["last"].append(parameter.grad.clone())
            state["sums"][0] += 1e-9 * parameter.grad.double().sum()
            if state["phase"] != "warm" or state["sums"][0].dtype != torch.float64:
                raise AssertionError("they have become others")
            by_columns = state["basis"].stride() == (1, 2)
            parameter.sub_(sum(state["last"]), alpha=1e-2 if by_columns else 2e-2)
            parameter.add_(state["sums"][0].float())
        return loss


class OddState(Net):
    def configure_optimizers(self):
        return Odd(self.parameters())


class Slow(torch.optim.Optimizer):
    """Follows another optimizer; its state dictionary has a form of its own, with both in it."""

    def __init__(self, fast):
        self.fast = fast
        super().__init__(fast.param_groups, {})
        self.slow = [parameter.detach().clone() for parameter in self.param_groups[0]["params"]]

    def step(self, closure=None):
        loss = self.fast.step(closure)
        for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
            parameter.data = slow.lerp_(parameter.data, 0.5).clone()
        return loss

    def state_dict(self):
        return {"slow": dict(enumerate(self.slow)), "fast": self.fast.state_dict()}

    def load_state_dict(self, state_dict):
        self.slow = [state_dict["slow"][i] for i in range(len(self.slow))]
        self.fast.load_state_dict(state_dict["fast"])


class Wrapped(Net):
    def configure_optimizers(self):
        return Slow(torch.optim.Adam(self.parameters(), lr=1e-2))


def test_odd_state_goes_on_as_it_was(tmp_path):
    check(Case(shuffled, OddState, at=[7]), tmp_path)


def test_one_in_another_goes_on_too_and_its_tensors_are_stored_as_such(tmp_path):
    check(Case(shuffled, Wrapped, at=[7], ckpt={"async_save": True}), tmp_path)
    stored = open_checkpoint(tmp_path / "straight" / "step=7").common["optimizer_states"][0]
    assert stored["slow"][0] == {"__nemologger__": "tensor", "key": "optimizer.0.slow.0"}


class Sharp(torch.optim.Optimizer):
    """As the implementation of SAM that most programs copy: the state dictionary is torch's, of the outer one."""

    def __init__(self, parameters, share_state):
        super().__init__(parameters, {"lr": 1e-2})
        self.base = torch.optim.Adam(self.param_groups, lr=1e-2)
        self.param_groups = self.base.param_groups
        if share_state:
            self.state = self.base.state

    def step(self, closure=None):
        return self.base.step(closure)


class Sharpened(Net):
    def __init__(self, share_state=False):
        super().__init__()
        self.share_state = share_state

    def configure_optimizers(self):
        optimizer = Sharp(self.parameters(), self.share_state)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]


@pytest.mark.parametrize("share_state", [False, True])
def test_one_that_the_outer_one_does_not_save_goes_on_and_follows_its_schedule(share_state, tmp_path):
    check(Case(shuffled, lambda: Sharpened(share_state), at=[7]), tmp_path)


def test_one_that_is_too_large_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nemologger.callbacks.program_state.most_of_each", lambda ranks: 100)
    train(Case(shuffled, Sharpened, steps=2), tmp_path, 1)
    assert caplog.text.count("optimizer 0.base is an optimizer within another one") == 1


class Closed(torch.optim.SGD):
    def state_dict(self):
        raise ZeroDivisionError


class HoldsItself(torch.optim.SGD):
    def state_dict(self):
        state = super().state_dict()
        return state | {"itself": [state, state.setdefault("again", state)]}


class NeverMade(torch.optim.SGD):
    def __init__(self, groups, lr):
        pass

    def step(self, closure=None):
        return closure()


@pytest.mark.parametrize("kind", [Closed, HoldsItself, NeverMade])
def test_one_that_cannot_be_read_is_named_and_no_obstacle(kind, tmp_path, caplog):
    class Within(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, 1e-2)
            self.base = kind(self.param_groups, 1e-2)

    class Holds(Net):
        def configure_optimizers(self):
            return Within(self.parameters())

    train(Case(shuffled, Holds, steps=2), tmp_path, 1)
    assert caplog.text.count("optimizer 0.base is an optimizer within another one") == 1
