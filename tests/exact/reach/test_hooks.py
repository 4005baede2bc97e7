"""What functions count that are hooked into modules and parameters, or made with what they count in."""

from __future__ import annotations

from functools import partial

import numpy as np
from exact.runs import Case, Net, check, check_chain, shuffled, train


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
