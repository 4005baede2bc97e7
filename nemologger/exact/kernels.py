"""What a GPU computes otherwise from run to run."""

from __future__ import annotations

import torch


def advice(device: torch.device) -> str:
    """What else it takes for a run on ``device`` to repeat."""
    if device.type != "cuda" or (torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark):
        return ""
    return (
        "loaders and random numbers go on where they were, but some kernels of a GPU, and NCCL on some machines, differ in "
        "the last bits from run to run; Trainer(deterministic=True, benchmark=False) keeps torch from using them"
    )


def with_own_dropout(device: torch.device, module: torch.nn.Module) -> list[str]:
    """The names of recurrent layers whose dropout is cuDNN's: it draws from a state of its own."""
    if device.type != "cuda" or not torch.backends.cudnn.enabled:
        return []
    named = [(name, part) for name, part in module.named_modules() if isinstance(part, torch.nn.RNNBase)]
    return [name for name, part in named if part.dropout > 0 and part.num_layers > 1]
