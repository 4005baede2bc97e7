"""What optimizers of the program keep beside what torch saves of them."""

from __future__ import annotations

import logging

import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train


class Keeps(torch.optim.SGD):
    """A count, norms of the last gradients, slow weights and noise decide about its steps; its own state has one of them."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1e-2)
        self.count, self.norms, self.means = 0, [], {"norm": 0.0}
        self.noise = torch.Generator().manual_seed(3)
        self.slow = [[one.detach().clone() for one in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.count += 1
        parameters = self.param_groups[0]["params"]
        self.norms.append(sum(float(one.grad.norm()) for one in parameters))
        self.means["norm"] = 0.9 * self.means["norm"] + self.norms[-1]
        for one, slow in zip(parameters, self.slow[0], strict=True):
            slow.lerp_(one, 1 / (1 + self.count + sum(self.norms[-3:]) + self.means["norm"]))
            one.copy_(slow + 1e-3 * torch.randn(slow.shape, generator=self.noise))
        return loss

    def state_dict(self):
        return super().state_dict() | {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        super().load_state_dict({name: one for name, one in state_dict.items() if name != "count"})


class Wraps(torch.optim.Optimizer):
    """Another one's state under its own name; most that are called Lookahead begin so."""

    def __init__(self, fast):
        self.fast, self.steps = fast, 0
        self.param_groups, self.defaults, self.state, self.fast_state = fast.param_groups, {}, fast.state, fast.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    def zero_grad(self, set_to_none=True):
        self.fast.zero_grad(set_to_none)

    def step(self, closure=None):
        self.steps += 1
        self.param_groups[0]["lr"] = 1e-2 / self.steps
        return self.fast.step(closure)

    def state_dict(self):
        return self.fast.state_dict()

    def load_state_dict(self, state_dict):
        self.fast.load_state_dict(state_dict)
        self.param_groups, self.state, self.fast_state = self.fast.param_groups, self.fast.state, self.fast.state


class Shares(torch.optim.SGD):
    """What it keeps by the parameter itself is in its state, too."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1e-2)
        self.means = {}

    def step(self, closure=None):
        loss = super().step(closure)
        for one in self.param_groups[0]["params"]:
            self.means[one] = self.state[one].setdefault("mean", torch.zeros_like(one))
            self.means[one].lerp_(one.detach(), 0.1)
        return loss


class ByParameter(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, lr=1e-2)
        self.slow = {}

    def step(self, closure=None):
        loss = super().step(closure)
        for one in self.param_groups[0]["params"]:
            self.slow.setdefault(one, one.detach().clone()).lerp_(one.detach(), 0.1)
        return loss


def with_(make):
    class With(Net):
        def configure_optimizers(self):
            return make(self.parameters())

    return With


@pytest.mark.parametrize(
    "make", [Keeps, lambda parameters: Wraps(torch.optim.Adam(parameters)), lambda parameters: Wraps(Keeps(parameters))]
)
def test_it_goes_on_as_it_was(make, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check(Case(shuffled, with_(make), at=[2, 7]), tmp_path)
    assert "exact resume, attribute" not in caplog.text


def test_what_is_found_by_the_parameter_is_named(tmp_path, caplog):
    train(Case(shuffled, with_(ByParameter), steps=2), tmp_path, 1)
    assert caplog.text.count("optimizer 0.slow has changed since training began, and is not saved: it has tensors") == 1


class Slow(torch.optim.SGD):
    """Its state takes long to be made: it is counted how often."""

    asked = 0

    def state_dict(self):
        Slow.asked += 1
        return super().state_dict()


def test_its_state_is_made_no_more_often_for_that(tmp_path):
    asked = []
    for exact in (False, True):
        Slow.asked = 0
        case = Case(shuffled, with_(lambda own: Slow(own, 1e-2)), steps=3, ckpt={"exact_resume": exact})
        train(case, tmp_path / str(exact), 1)
        asked.append(Slow.asked)
    assert asked[0] == asked[1] > 0


def test_what_the_optimizer_saves_itself_is_not(tmp_path, caplog):
    train(Case(shuffled, with_(Shares), steps=2), tmp_path, 1)
    assert "exact resume, attribute" not in caplog.text
