"""A checkpoint back in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.find import OURS
from nemologger.checkpoint.manifest import FileRecord
from nemologger.checkpoint.reading.in_place import Places, places_of
from nemologger.checkpoint.reading.read import read_parts, read_tensors
from nemologger.checkpoint.state.snapshot import MODEL, OPTIMIZERS, restore
from nemologger.checkpoint.verify import first_problem, problems
from nemologger.checkpoint.weights import Metadata, read_common, read_metadata, shapes_in
from nemologger.checkpoint.weights.reading import reading
from nemologger.disk.there import exists
from nemologger.errors import DamagedCheckpointError, NotFoundError

Template = Callable[[str, tuple[int, ...]], "torch.Tensor | None"]
Names = Sequence[Mapping[int, str]]


@dataclass(frozen=True)
class Opened:
    """A checkpoint of which everything but tensors has been read, and those perhaps too.

    Attributes:
        weights: Its directory of weights.
        common: What is not a tensor, as plain types.
        metadata: Which tensors there are, and where.
        tensors: Those that have been read, by flat key.
        records: What the manifest says of the files of ``weights``: what is read of them is compared with that.
        optimizer_names: For each optimizer, the parameter name behind each index; empty if they were not kept.
    """

    weights: Path
    common: Mapping[str, Any]
    metadata: Metadata
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    records: Mapping[str, FileRecord] = field(default_factory=dict)
    optimizer_names: Names = ()

    @property
    def has_optimizer(self) -> bool:
        """Whether training can go on from it."""
        return OPTIMIZERS in self.common

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Size and dtype of every tensor, by flat key."""
        return shapes_in(self.metadata)

    def read(
        self,
        template: Template = lambda key, sizes: None,
        *,
        into: nn.Module | None = None,
        model: bool = True,
        optimizer: bool = True,
    ) -> dict[str, Any]:
        """Lightning's checkpoint dictionary, tensors on the CPU. Reads what has not been read yet.

        Args:
            template: Tensors to shard like; see :func:`~nemologger.checkpoint.reading.read.read_tensors`.
            into: A module that will load the model next: tensors for it are read straight into its own where that is
                possible, and are in the dictionary. Not from a store, where a connection may break.
            model: With the model's tensors.
            optimizer: With the states of optimizers.

        Raises:
            DamagedCheckpointError: If something cannot be read, or is not as it was written. Nothing is in the module then
                if a file is missing or too short; else, it may hold parts of the model.
        """

        def wanted(key: str) -> bool:
            return (model or not is_of_model(key)) and (optimizer or is_of_model(key)) and key not in self.tensors

        places = None if into is None else _flat(places_of(into))
        tensors = read_tensors(
            self.weights, wanted, template, self.records, places, verify=False, metadata=self.metadata
        )
        common = {key: value for key, value in self.common.items() if optimizer or key != OPTIMIZERS}
        with reading(self.weights / names.COMMON):  # it may name tensors that are not there
            return restore(common, {**self.tensors, **tensors})


def open_checkpoint(checkpoint: Path, *, verified: bool = False) -> Opened:
    """A checkpoint, to be read. Runs no code of the files.

    Args:
        checkpoint: The checkpoint's directory, or its ``weights/``.
        verified: All of it has just been compared with its manifest. Else what is read is, if there is one.

    Raises:
        NotFoundError: If there are no weights.
        DamagedCheckpointError: If they cannot be read, or are not as they were written.
        RefusedError: If reading them would run code.
    """
    weights = weights_of(checkpoint)
    records = {} if verified else recorded(weights)
    common = read_common(weights)
    with reading(weights / names.COMMON):
        optimizer_names = common.pop(OURS, {}).get("optimizer_names", ())
    return Opened(weights, common, read_metadata(weights), records=records, optimizer_names=optimizer_names)


def recorded(weights: Path) -> dict[str, FileRecord]:
    """What the manifest says of the files of tensors in ``weights``; the small files beside them are compared at once.

    Nothing without a manifest: another tool wrote them, or somebody has taken them out of their checkpoint.

    Raises:
        DamagedCheckpointError: If the manifest or a small file is not as it was written.
    """
    checkpoint, home = weights.parent, weights.name
    if home not in (names.WEIGHTS, names.EMA_WEIGHTS) or not exists(checkpoint / names.MANIFEST):
        return {}
    manifest = manifests.read(checkpoint)
    inside = [file for file in manifest.files if Path(file).parent == Path(home)]
    shards = {file for file in inside if file.endswith(names.SHARD_SUFFIX)}
    wrong = first_problem(checkpoint, manifest, (file for file in inside if file not in shards))
    if wrong is not None:
        raise DamagedCheckpointError(f"{checkpoint}: {wrong}")
    return {Path(file).name: manifest.files[file] for file in shards}


def open_verified(checkpoint: Path, keep: Callable[[str], bool] = lambda key: True) -> Opened:
    """As :func:`open_checkpoint`, of a checkpoint with a manifest: every byte is compared with it.

    Args:
        checkpoint: The checkpoint's directory.
        keep: The flat keys of the tensors that are read in the same pass; of the others, only the checksum is computed.

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
    opened = open_checkpoint(checkpoint / names.WEIGHTS, verified=True)
    tensors = read_tensors(opened.weights, keep, records=records, metadata=opened.metadata)
    return replace(opened, tensors=tensors, records=records)


def load_checkpoint(checkpoint: Path, template: Template = lambda key, sizes: None) -> dict[str, Any]:
    """Lightning's checkpoint dictionary of ``checkpoint``; see :func:`open_checkpoint` and :meth:`Opened.read`."""
    return open_checkpoint(checkpoint).read(template)


def is_of_model(key: str) -> bool:
    """Whether a flat key is that of a tensor of the model, not of an optimizer."""
    return key.startswith(f"{MODEL}.")


def _flat(places: Places) -> Places:
    """``places`` of a model, by flat keys."""
    prefix = f"{MODEL}."

    def flat(stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
        inside = {key.removeprefix(prefix): one for key, one in stored.items() if is_of_model(key)}
        return {f"{prefix}{key}": place for key, place in places(inside).items()}

    return flat


def load_model(
    checkpoint: Path,
    template: Template = lambda key, sizes: None,
    *,
    into: Places | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, torch.Tensor]:
    """The model's state dictionary of ``checkpoint``, tensors on the CPU.

    Args:
        checkpoint: The checkpoint's directory, or its ``weights/``.
        template: Tensors to shard like; see :func:`~nemologger.checkpoint.reading.read.read_tensors`.
        into: Live tensors to read into; see :func:`~nemologger.checkpoint.reading.read.read_tensors`.
        wanted: Which of the names.

    Raises:
        DamagedCheckpointError: If what is read is not as it was written.
    """
    weights = weights_of(checkpoint)
    records = recorded(weights)
    tensors = read_tensors(
        weights,
        lambda key: is_of_model(key) and wanted(key.removeprefix(f"{MODEL}.")),
        template,
        records=records,
        into=None if into is None else _flat(into),
        verify=False,
    )
    extra = {name: value for name, value in read_common(weights).get(MODEL, {}).items() if wanted(name)}
    with reading(weights / names.COMMON):
        state: dict[str, Any] = restore({MODEL: extra}, tensors)[MODEL]
    return state


def load_parts(checkpoint: Path, into: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the tensors of ``checkpoint``'s model that ``into`` names, this rank's parts, plain and on the CPU.

    Args:
        checkpoint: The checkpoint's directory, or one with weights.
        into: By name in the model's state dictionary, live tensors of the same sizes, plain or sharded; what is here of them
            is read into where that is possible, and returned then.

    Raises:
        ModelMismatchError: If one has other sizes.
        DamagedCheckpointError: If what is read is not as it was written.
    """
    prefix, weights = f"{MODEL}.", weights_of(checkpoint)
    stored = {f"{prefix}{name}": tensor for name, tensor in into.items()}
    parts = read_parts(weights, stored, recorded(weights))
    return {key.removeprefix(prefix): part for key, part in parts.items()}


def averages_of(checkpoint: Path) -> Path | None:
    """The directory with the averaged weights of ``checkpoint``, which may be its ``weights/`` or that directory itself."""
    home = checkpoint.parent if checkpoint.name in (names.WEIGHTS, names.EMA_WEIGHTS) else checkpoint
    averages = home / names.EMA_WEIGHTS
    return averages if exists(averages / names.DCP_METADATA) else None


def weights_of(checkpoint: Path) -> Path:
    """The directory with the weights of ``checkpoint``, which may be that directory itself.

    Raises:
        NotFoundError: If there is none.
    """
    for candidate in (checkpoint / names.WEIGHTS, checkpoint):
        if exists(candidate / names.DCP_METADATA):
            return candidate
    raise NotFoundError(
        f"{checkpoint} holds no weights: neither it nor its {names.WEIGHTS}/ has a {names.DCP_METADATA}. A checkpoint "
        "is a directory in the checkpoints/ of a run"
    )
