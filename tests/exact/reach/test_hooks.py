"""What functions count that are hooked into modules and parameters, or made with what they count in."""

from __future__ import annotations

import random
from functools import partial
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from exact.runs import Case, Net, check, check_chain, shuffled, train
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook


def by_list(factor):
    calls = [0]

    def hook(*given):
        calls[0] += 1
        return given[-1] * factor ** calls[0]

    return hook


def by_variable(factor):
    calls = 0

    def hook(*given):
        nonlocal calls
        calls += 1
        return given[-1] * factor**calls

    return hook


def in_dictionary(state, *given):
    state["calls"] += 1
    return given[-1] * 0.97 ** state["calls"]


def weighed_by(state, value, *, gamma):
    state.append(value.item() % 1)
    return value * (1 + sum(state)) ** gamma


class Counts:
    def __init__(self):
        self.calls = 0

    def __call__(self, *given):
        self.calls += 1
        return given[-1] * 0.98**self.calls


class Hooked(Net):
    def __init__(self):
        super().__init__()
        first, dropout, last = self.net
        first.weight.register_hook(by_list(0.9))
        first.bias.register_hook(partial(in_dictionary, {"calls": 0}))
        last.weight.register_hook(Counts())
        norms = []
        last.bias.register_hook(lambda gradient: (norms.append(gradient.item()), gradient * (1 + sum(norms)))[1])

        def scale(parameter):
            scale.calls += 1
            parameter.grad.mul_(0.95**scale.calls)

        scale.calls = 0
        last.weight.register_post_accumulate_grad_hook(scale)
        first.register_forward_hook(by_variable(0.99))
        dropout.register_forward_hook(Counts().__call__)
        times = by_list(0.9)
        last.register_full_backward_hook(lambda _, inner, outer: tuple(map(times, inner)))

        def weighed(part, given, by=[1.0]):  # noqa: B006
            by[0] *= 0.9
            return (given[0] * by[0],)

        last.register_forward_pre_hook(weighed)
        self.weigh = partial(in_dictionary, {"calls": 0})
        self.weigh_again = partial(weighed_by, [], gamma=2)

    def on_train_start(self):
        self.net.register_forward_hook(by_variable(0.98))

    def loss(self, batch):
        return self.weigh_again(self.weigh(super().loss(batch)))


def test_they_go_on_as_they_were(tmp_path):
    check(Case(shuffled, Hooked, at=[3, 8]), tmp_path)


class Draws(Net):
    """From generators that a function was made with, by place and by name."""

    def __init__(self):
        super().__init__()

        def noise(value, by=np.random.RandomState(3), *, more=np.random.RandomState(4)):  # noqa: B008
            return value * (1 + by.rand() * more.rand())

        self.noise = partial(noise)

    def loss(self, batch):
        return self.noise(super().loss(batch))


def test_generators_that_a_function_was_made_with_go_on_life_after_life(tmp_path):
    check_chain(Case(shuffled, Draws, at=[3, 5, 8]), tmp_path)


class Features:
    def __init__(self, part):
        part.register_forward_hook(self.keep)

    def keep(self, part, given, out):
        self.out, self.wide = out, out.repeat(1, 150_000)


class Looks(Net):
    """Keeps what a hook has seen, for a picture say."""

    def __init__(self):
        super().__init__()
        Features(self.net[0])
        seen, norms = {}, []
        self.net[0].register_forward_hook(lambda part, given, out: seen.update(out=out, wide=out.repeat(1, 150_000)))
        self.net[0].weight.register_hook(lambda gradient: norms.append(gradient.norm()))


def test_what_a_hook_only_notes_is_not_named(tmp_path, caplog):
    train(Case(shuffled, Looks, steps=3), tmp_path, 1)
    assert not [record for record in caplog.records if "exact resume, attribute" in record.message]


class Warms:
    """Hooked into an optimizer."""

    def __init__(self):
        self.steps = 0

    def __call__(self, optimizer, *given):
        self.steps += 1
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.9**self.steps


class HookedOptimizer(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)
        optimizer.register_step_post_hook(Warms())
        rng, step, calls = np.random.default_rng(1), optimizer.step, 0

        def noise(optimizer, *given):
            optimizer.param_groups[0]["params"][0].data.mul_(0.5 + rng.random() / 2)

        optimizer.register_step_pre_hook(noise)

        def slower(closure=None):
            nonlocal calls
            calls += 1
            optimizer.param_groups[0]["momentum"] = 0.5 * 0.9**calls
            return step(closure)

        optimizer.step = slower
        optimizer.rate = 1.0
        return optimizer

    def on_train_batch_end(self, *given):
        optimizer = self.optimizers().optimizer
        optimizer.rate *= 0.9
        self.net[2].bias.data.mul_(optimizer.rate)


def test_hooks_of_optimizers_and_what_is_put_on_them_go_on(tmp_path):
    check(Case(shuffled, HookedOptimizer, at=[3, 8]), tmp_path)


class HookedEverywhere(Net):
    """In each module and optimizer there is; forward() is replaced in one."""

    handles: ClassVar = []

    def __init__(self):
        super().__init__()
        while self.handles:  # they outlive the life before
            self.handles.pop().remove()
        times, rng, forward = by_variable(0.99), np.random.default_rng(1), self.net[1].forward
        linear = {self.net[0], self.net[2]}
        self.handles += [
            register_module_forward_hook(lambda part, given, out: times(out) if part in linear else None),
            register_module_forward_pre_hook(
                lambda part, given: (given[0] + rng.random(),) if part in linear else None
            ),
            register_optimizer_step_post_hook(Warms()),
        ]
        again = by_list(0.98)
        self.net[1].forward = lambda given: again(forward(given))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_hooks_of_all_modules_and_all_optimizers_go_on(tmp_path):
    try:
        check(Case(shuffled, HookedEverywhere, at=[3, 8]), tmp_path)
    finally:
        while HookedEverywhere.handles:
            HookedEverywhere.handles.pop().remove()


class GivenGenerators(Net):
    """Hooks with generators in a partial, by place and by name, and as a default."""

    def __init__(self):
        super().__init__()

        def noise(rng, part, given, out, *, by):
            return out + torch.randn(out.shape, generator=rng) * by.random()

        self.net[0].register_forward_hook(partial(noise, torch.Generator().manual_seed(1), by=random.Random(2)))

        def more(part, given, out, rng=np.random.default_rng(3)):  # noqa: B008
            return out + rng.random()

        self.net[2].register_forward_hook(more)


def test_generators_that_a_hook_was_made_with_go_on_life_after_life(tmp_path):
    check_chain(Case(shuffled, GivenGenerators, at=[3, 5, 8]), tmp_path)


class Looked:
    def __call__(self, *given):
        pass


def doubled(module, given, output):
    return output * 2


class HookedLater(Net):
    """Registers one in mid-training, takes another away, and has one that each life registers when it is needed."""

    needed = None

    def __init__(self):
        super().__init__()
        self.first = self.net[0].register_forward_hook(doubled)

    def training_step(self, batch, batch_idx):
        self.needed = self.needed or self.net[2].register_forward_hook(doubled)
        if self.global_step == 4:
            self.first.remove()
            self.net[2].weight.register_hook(lambda gradient: gradient * 2)
            self.optimizers().optimizer.register_step_post_hook(Looked())
        return super().training_step(batch, batch_idx)


class LooksIntoBatches(pl.Callback):
    """Looks into each batch, and at nothing between two."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.handle = pl_module.net[2].register_forward_hook(lambda *given: None)

    def on_train_batch_end(self, *_):
        self.handle.remove()


class LooksItself(Net):
    def on_train_batch_start(self, *_):
        self.handle = self.net[2].register_forward_hook(lambda *given: None)

    def on_train_batch_end(self, *_):
        self.handle.remove()


@pytest.mark.parametrize(("model", "callbacks"), [(Net, lambda: [LooksIntoBatches()]), (LooksItself, list)])
def test_hooks_of_one_batch_are_not_named(model, callbacks, tmp_path, caplog):
    case = Case(shuffled, model, steps=4, callbacks=callbacks)
    train(case, tmp_path, 1)
    train(case, tmp_path / "after", 1, tmp_path / "step=2")
    assert "of the program are" not in caplog.text


def test_hooks_that_a_resumed_run_lacks_are_named_after_its_first_step(tmp_path, caplog):
    case = Case(shuffled, HookedLater, steps=8)
    train(case, tmp_path, 1)
    train(case, tmp_path / "before", 1, tmp_path / "step=3")
    assert "of the program are" not in caplog.text
    train(case, tmp_path / "after", 1, tmp_path / "step=6")
    told = [record.getMessage() for record in caplog.records if "of the program are" in record.getMessage()]
    there, weight, optimizer = told
    assert "module.net.0._forward_hooks of the program are doubled now, and were none when" in there
    assert "module.net.2.weight._backward_hooks of the program are none now" in weight
    assert "optimizer 0._optimizer_step_post_hooks of the program are none now, and were Looked when" in optimizer
