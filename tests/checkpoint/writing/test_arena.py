"""The image in memory is, byte for byte, the file that a synchronous save writes."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from helpers.engine import lightning_state
from helpers.gpu import NEEDS_GPU

from nemologger.checkpoint.state.shards import held, part_of
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing.arena import Arena
from nemologger.checkpoint.writing.plan import files_of
from nemologger.checkpoint.writing.write import write_share
from nemologger.disk import LocalDisk


def _odd(device: str) -> dict[str, torch.Tensor]:
    with torch.device(device):
        return {
            "half": torch.randn(3, 5, dtype=torch.bfloat16).t(),
            "eighth": torch.randn(7).to(torch.float8_e4m3fn),
            "flag": torch.tensor([True, False, True]),
            "scalar": torch.tensor(1.5),
            "empty": torch.zeros(0, 3),
            "complex": torch.randn(4, dtype=torch.complex64).conj(),
            "negative": torch.randn(4, dtype=torch.complex64).conj().imag,
            "large": torch.randn(100, 100),
            "channels last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
            "every other": torch.randn(40, 10)[::2],
        }


@pytest.mark.parametrize(
    "make",
    [
        lambda: lightning_state(3),
        lambda: {"state_dict": _odd("cpu")},
        pytest.param(lambda: {"state_dict": _odd("cuda")}, marks=NEEDS_GPU),
    ],
    ids=["model", "odd", "odd on a GPU"],
)
def test_the_image_is_the_file(tmp_path, make):
    snapshot = take(make())
    tensors = snapshot.tensors
    files = files_of(0, 1, {key: held(tensor, key) for key, tensor in tensors.items()}, snapshot, 2)

    def read(piece):
        return part_of(tensors[piece.key], piece)

    (tmp_path / "weights").mkdir()
    write_share(LocalDisk(), tmp_path, files, read)
    with closing(Arena(files, {key: torch.zeros_like(tensor) for key, tensor in tensors.items()})) as arena:
        for _ in range(2):  # a place is used again for the next save
            arena.stage(read)
            for image in arena.images:
                assert (
                    bytes(arena.memory[image.offset : image.offset + image.size])
                    == (tmp_path / image.name).read_bytes()
                )
