"""A checkpoint back in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.find import OURS
from nemologger.checkpoint.read import read_parts, read_tensors
from nemologger.checkpoint.snapshot import MODEL, restore
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.weights import read_common
from nemologger.errors import DamagedCheckpointError, NotFoundError


def load_checkpoint(
    checkpoint: Path, template: Callable[[str, tuple[int, ...]], torch.Tensor | None] = lambda key, sizes: None
) -> dict[str, Any]:
    """Lightning's checkpoint dictionary of ``checkpoint``, tensors on the CPU. Runs no code of the files.

    Args:
        checkpoint: The checkpoint's directory, or its ``weights/``.
        template: Tensors to shard like; see :func:`~nemologger.checkpoint.read.read_tensors`.

    Raises:
        NotFoundError: If there are no weights.
        DamagedCheckpointError: If they cannot be read.
        RefusedError: If reading them would run code.
    """
    weights = weights_of(checkpoint)
    common = read_common(weights)
    common.pop(OURS, None)
    return restore(common, read_tensors(weights, template=template))


def load_verified(checkpoint: Path) -> dict[str, Any]:
    """As :func:`load_checkpoint`, of a checkpoint with a manifest: every byte is compared with it, in the same pass.

    Raises:
        DamagedCheckpointError: If it is not as it was written. There may be more that is wrong with it than this says.
        RefusedError: If reading it would run code.
    """
    manifest = manifests.read(checkpoint)
    records = {
        Path(file).name: record
        for file, record in manifest.files.items()
        if file.endswith(names.SHARD_SUFFIX) and Path(file).parent == Path(names.WEIGHTS)
    }
    in_weights = {f"{names.WEIGHTS}/{name}" for name in records}
    if wrong := problems(checkpoint, shallow=in_weights.__contains__):
        raise DamagedCheckpointError(f"{checkpoint}: {wrong[0]}")
    weights = checkpoint / names.WEIGHTS
    common = read_common(weights)
    common.pop(OURS, None)
    return restore(common, read_tensors(weights, records=records))


def optimizer_names(checkpoint: Path) -> list[dict[int, str]]:
    """For each optimizer in ``checkpoint``, the parameter name behind each index; empty if they were not kept."""
    names: list[dict[int, str]] = read_common(weights_of(checkpoint)).get(OURS, {}).get("optimizer_names", [])
    return names


def load_model(
    checkpoint: Path, template: Callable[[str, tuple[int, ...]], torch.Tensor | None] = lambda key, sizes: None
) -> dict[str, torch.Tensor]:
    """The model's state dictionary of ``checkpoint``, tensors on the CPU, or sharded as :func:`load_checkpoint` says."""
    weights = weights_of(checkpoint)
    prefix = f"{MODEL}."
    tensors = read_tensors(weights, lambda key: key.startswith(prefix), template)
    state: dict[str, Any] = restore({MODEL: read_common(weights).get(MODEL, {})}, tensors)[MODEL]
    return state


def load_parts(checkpoint: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the tensors of ``checkpoint``'s model that ``like`` names, this rank's parts, plain and on the CPU.

    Args:
        checkpoint: The checkpoint's directory, or one with weights.
        like: By name in the model's state dictionary, tensors of the same sizes, plain or sharded.

    Raises:
        ModelMismatchError: If one has other sizes.
    """
    prefix = f"{MODEL}."
    parts = read_parts(weights_of(checkpoint), {f"{prefix}{name}": tensor for name, tensor in like.items()})
    return {key[len(prefix) :]: part for key, part in parts.items()}


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
