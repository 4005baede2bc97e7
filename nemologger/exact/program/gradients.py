"""Gradients that wait for a step to come: who zeroes them by hand may sum them up across a checkpoint.

``if (batch_idx + 1) % 4 == 0: optimizer.step()`` at the end of an epoch leaves those of its last batches to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nemologger.exact.values import contents, plain_contents
from nemologger.exact.values.plain_contents import CannotBeKeptError


def keep_gradients(module: nn.Module, most: int, *, sharded: bool = False) -> Any:
    """Those that are there, as plain types.

    Raises:
        CannotBeKeptError: They take more than ``most`` bytes, are ``sharded``, or sparse.
    """
    there = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    if there and sharded:
        raise CannotBeKeptError("is sharded")
    if not all(map(contents.is_plain, there.values())):
        raise CannotBeKeptError("is sparse")
    return plain_contents.keep_state(there, [most])


def put_back_gradients(module: nn.Module, plain: Any) -> None:
    """What :func:`keep_gradients` returned: the program zeroes those that it does not want."""
    gradients: Mapping[str, Any] = plain_contents.unkept(plain)
    for name, parameter in module.named_parameters():
        gradient = gradients.get(name)
        if gradient is not None and gradient.shape == parameter.shape and gradient.dtype == parameter.dtype:
            parameter.grad = gradient.to(parameter.device)
