"""A checkpoint back in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemologger import names
from nemologger.checkpoint.find import OURS
from nemologger.checkpoint.read import read_tensors
from nemologger.checkpoint.snapshot import MODEL, restore
from nemologger.checkpoint.weights import read_common
from nemologger.errors import NotFoundError


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Lightning's checkpoint dictionary of ``checkpoint``, tensors on the CPU. Runs no code of the files.

    Args:
        checkpoint: The checkpoint's directory, or its ``weights/``.

    Raises:
        NotFoundError: If there are no weights.
        DamagedCheckpointError: If they cannot be read.
        RefusedError: If reading them would run code.
    """
    weights = weights_of(checkpoint)
    common = read_common(weights)
    common.pop(OURS, None)
    return restore(common, read_tensors(weights))


def optimizer_names(checkpoint: Path) -> list[dict[int, str]]:
    """For each optimizer in ``checkpoint``, the parameter name behind each index; empty if they were not kept."""
    names: list[dict[int, str]] = read_common(weights_of(checkpoint)).get(OURS, {}).get("optimizer_names", [])
    return names


def load_model(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's state dictionary of ``checkpoint``, tensors on the CPU."""
    weights = weights_of(checkpoint)
    prefix = f"{MODEL}."
    tensors = read_tensors(weights, lambda key: key.startswith(prefix))
    state: dict[str, Any] = restore({MODEL: read_common(weights).get(MODEL, {})}, tensors)[MODEL]
    return state


def averages_of(checkpoint: Path) -> Path | None:
    """The directory with the averaged weights of ``checkpoint``, which may be its ``weights/`` or that directory itself."""
    home = checkpoint.parent if checkpoint.name in (names.WEIGHTS, names.EMA_WEIGHTS) else checkpoint
    averages = home / names.EMA_WEIGHTS
    return averages if (averages / names.DCP_METADATA).exists() else None


def weights_of(checkpoint: Path) -> Path:
    """The directory with the weights of ``checkpoint``, which may be that directory itself.

    Raises:
        NotFoundError: If there is none.
    """
    for candidate in (checkpoint / names.WEIGHTS, checkpoint):
        if (candidate / names.DCP_METADATA).exists():
            return candidate
    raise NotFoundError(
        f"{checkpoint} holds no weights: neither it nor its {names.WEIGHTS}/ has a {names.DCP_METADATA}"
    )
