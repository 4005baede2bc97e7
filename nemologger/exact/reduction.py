"""The order in which DistributedDataParallel sums gradients over ranks.

DDP packs gradients into buckets. After its first backward it packs them anew, in the order in which they became ready; the
sum of three numbers and more depends on where in a bucket they lie. A resumed run would sum its first step as the first step
of all is summed, and differ in the last bits from the run that was never stopped. So the order is noted in the first step,
kept in checkpoints, and played once, with zeros, before a resumed run takes its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def depends_on_order(model: object) -> bool:
    """Whether ``model`` is one whose sums depend on the order, and that changes it after its first backward."""
    return (
        isinstance(model, DistributedDataParallel)
        and dist.get_world_size(model.process_group) > 2
        and not (model.static_graph or model.find_unused_parameters)
    )


class GradientOrder:
    """Notes the order in which the gradients of ``model`` become ready."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self._names: list[str] = []
        self._expected = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._names.append(name))
            for name, parameter in model.module.named_parameters()
            if parameter.requires_grad
        ]

    def forget(self) -> None:
        """Begin again: DDP has summed nothing, gradients were only accumulated."""
        self._names.clear()

    def settle(self) -> list[str]:
        """The names of the parameters in order; empty if not each had its gradient once, which nobody can play again."""
        for hook in self._hooks:
            hook.remove()
        once = len(self._names) == len(self._expected) and set(self._names) == self._expected
        return list(self._names) if once else []


def play(model: DistributedDataParallel, order: Sequence[str]) -> None:
    """Have ``model`` sum zeros in ``order``, so that it packs its buckets for it. Collective.

    Args:
        model: Before its first forward; its parameters have no gradients.
        order: The names of all its parameters that need a gradient; nothing is done if they are not the ones of ``model``.
    """
    module = model.module
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if set(order) != set(parameters):
        return
    before = [parameter.grad for parameter in parameters.values()]

    def forward(nothing: None) -> torch.Tensor:
        chain = torch.zeros((), device=next(iter(parameters.values())).device)
        for name in reversed(order):  # backward begins with what was added last
            chain = cast(Any, _Zero).apply(parameters[name], chain)
        return chain

    own = vars(module).get("forward")  # Lightning's, of a compiled module
    vars(module)["forward"] = forward
    try:
        model(None).backward()  # on a GPU, DDP cannot do without an input
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own
        for parameter, gradient in zip(parameters.values(), before, strict=True):
            parameter.grad = gradient


class _Zero(torch.autograd.Function):
    """Passes a number on; the gradient for ``parameter`` is zero."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, chain: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(parameter)
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (parameter,) = ctx.saved_tensors
        return torch.zeros_like(parameter), gradients[0]
