"""Buffers that each rank has for itself: a checkpoint holds those of rank 0.

DistributedDataParallel brings rank 0's to the others before each forward. Where nobody does so, with FSDP, FSDP2, tensor
parallelism, ``DDPStrategy(broadcast_buffers=False)`` or manual optimization, running statistics are of the data that the
rank has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nemologger.exact.values import contents, plain_contents


def are_exchanged(model: nn.Module | None, *, by_hand: bool) -> bool:
    """Whether all ranks have rank 0's.

    Args:
        model: As its strategy has wrapped it.
        by_hand: With manual optimization Lightning tells DistributedDataParallel after each step not to exchange anything
            in the next forward: that happens in the very first one alone, when all are the same.
    """
    return isinstance(model, DistributedDataParallel) and model.broadcast_buffers and not by_hand


def go_on_apart(model: nn.Module | None, *, by_hand: bool) -> None:
    """Let the first forward of a resumed run be one like those before it."""
    if by_hand and isinstance(model, DistributedDataParallel):
        model.require_forward_param_sync = False


def fingerprints(module: nn.Module) -> dict[str, int]:
    """A number for each that is saved, which is the same on two ranks if they hold the same."""
    return {name: contents.fingerprint(buffer.detach().cpu()) for name, buffer in _saved(module)}


def differing(module: nn.Module, zeros: Mapping[str, int], most: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Those that are not rank 0's, as plain types, and of what is not kept, why.

    Args:
        module: The model.
        zeros: Rank 0's :func:`fingerprints`.
        most: Bytes that are kept at most.
    """
    left, kept, lost = [most], {}, {}
    own = fingerprints(module)
    for name, buffer in _saved(module):
        if zeros.get(name) != own[name]:
            try:
                kept[name] = plain_contents.keep(buffer, left)
            except plain_contents.CannotBeKeptError as error:
                lost[name] = str(error)
    return kept, lost


def restore(module: nn.Module, kept: Mapping[str, Any]) -> None:
    """Bring back what :func:`differing` returned."""
    for name, buffer in _saved(module):
        if name in kept:
            plain_contents.put_back(buffer, kept[name], same=True)


def _saved(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that checkpoints hold, in full on every rank."""
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():  # noqa: SLF001  as in torch's state_dict()
            if type(buffer) is torch.Tensor and name not in part._non_persistent_buffers_set:  # noqa: SLF001
                yield f"{path}.{name}", buffer
