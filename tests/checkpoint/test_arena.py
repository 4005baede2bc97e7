"""The image in memory is, byte for byte, the file that a synchronous save writes."""

from __future__ import annotations

import pytest
import torch
from helpers.engine import lightning_state

from nemologger.checkpoint.arena import Arena
from nemologger.checkpoint.plan import files_of
from nemologger.checkpoint.shards import held, part_of
from nemologger.checkpoint.snapshot import take
from nemologger.checkpoint.write import write_share
from nemologger.disk import LocalDisk


def _odd() -> dict[str, torch.Tensor]:
    return {
        "half": torch.randn(3, 5, dtype=torch.bfloat16).t(),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "complex": torch.randn(4, dtype=torch.complex64).conj(),
        "large": torch.randn(100, 100),
    }


@pytest.mark.parametrize("state", [lightning_state(3), {"state_dict": _odd()}], ids=["model", "odd"])
def test_the_image_is_the_file(tmp_path, state):
    snapshot = take(state)
    tensors = snapshot.tensors
    files = files_of(0, 1, {key: held(tensor, key) for key, tensor in tensors.items()}, snapshot, 2)

    def read(piece):
        return part_of(tensors[piece.key], piece)

    write_share(LocalDisk(), tmp_path, files, read)
    arena = Arena(files, {key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    try:
        for _ in range(2):  # a place is used again for the next save
            arena.stage(read)
            for image in arena.images:
                assert (
                    bytes(arena.memory[image.offset : image.offset + image.size])
                    == (tmp_path / image.name).read_bytes()
                )
    finally:
        arena.close()
