"""Reading and checking in one pass: what is read is right, and every changed byte is found, wanted or not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from helpers.engine import save

from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import Manifest, Recorder
from nemologger.checkpoint.reading import blocks
from nemologger.checkpoint.reading.blocks import CheckedFile, Part
from nemologger.checkpoint.reading.load import load_checkpoint, open_verified
from nemologger.checkpoint.state import snapshot
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import LocalDisk
from nemologger.errors import DamagedCheckpointError
from nemologger.ranks import SingleProcess


def _record(content: bytes):
    recorder = Recorder()
    for _ in recorder.over([content]):
        pass
    return recorder.record


@pytest.mark.parametrize("seed", range(20))
def test_every_part_gets_its_bytes(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    block = draw.choice([64, 1000, 4096])
    for module in (blocks, manifests):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(blocks, "_STEP", draw.choice([7, 64, 500]))
    monkeypatch.setattr(blocks, "_MOST_BUFFERS", draw.choice([1, 3, 100]))
    content = draw.randbytes(draw.choice([1, block, 3 * block, 3 * block + 17]))
    path = tmp_path / "file"
    path.write_bytes(content)
    parts, wanted, position = [], [], 0
    while (position := position + draw.choice([0, 0, 1, 30, block + 5])) < len(content):
        length = min(draw.choice([1, 5, 100, 2 * block]), len(content) - position)
        parts.append(Part(position, memoryview(bytearray(length))))
        wanted.append(content[position : position + length])
        position += length
    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = CheckedFile(path, parts, _record(content))
        for number in range(len(file.record.blocks)):
            file.read(descriptor, number)
        assert [bytes(part.target) for part in parts] == wanted
        changed = bytearray(content)
        at = draw.randrange(len(content))
        changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        for number in range(len(file.record.blocks)):
            if number == at // block:
                with pytest.raises(DamagedCheckpointError, match="have changed since they were written"):
                    file.read(descriptor, number)
            else:
                file.read(descriptor, number)
        path.write_bytes(content[:-1])
        with pytest.raises(DamagedCheckpointError, match="ends at byte"):
            file.read(descriptor, len(file.record.blocks) - 1)
    finally:
        os.close(descriptor)


def _large(path: Path) -> dict[str, torch.Tensor]:
    """Some blocks of 16 MiB, and tensors of all sizes."""
    torch.manual_seed(0)
    state = {f"w{i}": torch.randn(size) for i, size in enumerate((9_000_000, 3, 1200, 5_000_000, 0, 70_000))}
    Saver(LocalDisk(), SingleProcess()).save(snapshot.take({"state_dict": state}), path, Manifest(step=1, epoch=0))
    return state


def test_it_loads_the_same_as_without(tmp_path):
    state = _large(tmp_path / "x")
    loaded = open_verified(tmp_path / "x").read()["state_dict"]
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    plain = load_checkpoint(tmp_path / "x")["state_dict"]
    assert all(torch.equal(loaded[key], plain[key]) for key in plain)


def test_a_flipped_byte_anywhere_is_found(tmp_path):
    _large(tmp_path / "x")
    for path in sorted((tmp_path / "x" / "weights").glob("*.distcp")):
        content = path.read_bytes()
        for at in (0, 1, 16 << 20, len(content) // 2, len(content) - 1):
            with path.open("r+b") as file:
                file.seek(at % len(content))
                byte = file.read(1)
                file.seek(at % len(content))
                file.write(bytes([byte[0] ^ 4]))
            with pytest.raises(DamagedCheckpointError, match=path.name):
                open_verified(tmp_path / "x")
            with path.open("r+b") as file:
                file.seek(at % len(content))
                file.write(byte)
    open_verified(tmp_path / "x")


@pytest.mark.parametrize("file", ["context/io.json", "weights/.metadata", "weights/common.pt", "weights/metadata.json"])
def test_small_files_are_checked_before_they_are_used(tmp_path, file):
    save(tmp_path / "x", 1)
    path = tmp_path / "x" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=file):
        open_verified(tmp_path / "x")


def test_a_file_that_is_missing_is_named(tmp_path):
    save(tmp_path / "x", 1)
    (tmp_path / "x" / "weights" / "__0_1.distcp").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"__0_1\.distcp: is missing"):
        open_verified(tmp_path / "x")
