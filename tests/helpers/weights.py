"""``weights/`` of any tensors, without the rest of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from nemologger import names
from nemologger.checkpoint.state.shards import held, part_of
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.weights import BACKEND, Payload, described, dump_common, metadata, payloads
from nemologger.checkpoint.writing.plan import entries_of, files_of
from nemologger.checkpoint.writing.write import write_share
from nemologger.disk import LocalDisk


def write(directory: Path, state: dict[str, torch.Tensor], files: int = 2, world: int = 1) -> Path:
    """``state`` as the weights that ``world`` ranks would write."""
    snapshot = take({"state_dict": state})
    directory.mkdir(parents=True, exist_ok=True)
    stored = []
    parts = {key: held(tensor, key) for key, tensor in snapshot.tensors.items()}
    for rank in range(world):
        places = {Path(name).name: row for name, row in files_of(rank, world, parts, snapshot, files).items()}
        write_share(LocalDisk(), directory, places, lambda piece: part_of(snapshot.tensors[piece.key], piece))
        stored += entries_of(places)
    (directory / names.DCP_METADATA).write_bytes(metadata(snapshot.tensors, snapshot.paths, stored))
    (directory / names.COMMON).write_bytes(dump_common(snapshot.common))
    (directory / names.BACKEND).write_bytes(BACKEND)
    return directory


def places_of(weights: Path, keys: Iterable[str] | None = None) -> dict[str, list[Payload]]:
    """Where the bytes of whole tensors lie; default of all."""
    shapes = described(weights)
    wholes = {key: ((0,) * len(sizes), sizes) for key, (sizes, _) in shapes.items()}
    return payloads(weights, wholes if keys is None else {key: wholes[key] for key in keys})
