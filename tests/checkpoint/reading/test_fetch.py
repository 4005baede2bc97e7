"""Tensors from a store: blocks, checked as they come."""

from __future__ import annotations

import pytest
import torch

from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import Manifest, Recorder
from nemologger.checkpoint.reading import fetch as fetching
from nemologger.checkpoint.reading import read as reading
from nemologger.checkpoint.reading.overlaps import Block
from nemologger.checkpoint.reading.read import read_blocks, read_tensors
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing.saver import Saver
from nemologger.errors import DamagedCheckpointError
from nemologger.ranks import SingleProcess
from nemologger.stores.path import in_store, storage_path
from nemologger.stores.remote_disk import OverlappingDisk, disk_of

TENSORS = {
    "large": torch.arange(3_000_000, dtype=torch.float32),
    "matrix": torch.arange(3_000_000, dtype=torch.float32).reshape(1500, 2000),
    "small": torch.arange(3),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.arange(100_000).to(torch.bfloat16).reshape(10, -1),
}


@pytest.fixture
def checkpoint(monkeypatch):
    """One whose tensors reach over several blocks."""
    for module in (manifests, fetching):
        monkeypatch.setattr(module, "BLOCK", 1 << 20)
    path = storage_path("memory://bucket/x")
    disk = OverlappingDisk(in_store(path).store)
    Saver(disk, SingleProcess()).save(take({"state_dict": TENSORS}), path, Manifest(step=1, epoch=0))
    yield path
    disk.remove(path)


def test_all_and_some(checkpoint):
    read = read_tensors(checkpoint / "weights")
    assert set(read) == {f"state_dict.{name}" for name in TENSORS}
    assert all(torch.equal(value, TENSORS[key[11:]]) for key, value in read.items())
    some = read_tensors(checkpoint / "weights", lambda key: "half" in key)
    assert torch.equal(some.pop("state_dict.half"), TENSORS["half"])
    assert not some


def test_only_the_blocks_that_are_needed(checkpoint, monkeypatch):
    asked = []
    fetch = fetching._fetch
    monkeypatch.setattr(fetching, "_fetch", lambda *all: asked.append(all) or fetch(*all))
    read_tensors(checkpoint / "weights", lambda key: "scalar" in key)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("begin", "sizes"), [((0, 0), (1500, 2000)), ((300, 0), (600, 2000)), ((700, 900), (700, 700)), ((1499, 7), (1, 3))]
)
def test_a_part_of_a_tensor(checkpoint, begin, sizes):
    """Rows in one run, and columns whose rows reach over blocks, fetched in parallel."""
    rows, columns = (slice(at, at + size) for at, size in zip(begin, sizes, strict=True))
    block = Block(torch.empty(sizes), begin)
    read_blocks(checkpoint / "weights", {"state_dict.matrix": block})
    assert torch.equal(block.memory, TENSORS["matrix"][rows, columns])


def test_the_whole_file_is_looked_at_if_that_is_wanted(checkpoint):
    """Also where nothing lies that is wanted."""
    disk, records = disk_of(checkpoint), {}
    for file, record in manifests.read(checkpoint).files.items():
        if file.endswith(".distcp"):
            records[file.partition("/")[2]] = record
    assert len(records) == 2
    one = {"wanted": lambda key: "small" in key, "records": records}
    assert torch.equal(read_tensors(checkpoint / "weights", **one)["state_dict.small"], TENSORS["small"])
    for name in records:
        path = checkpoint / "weights" / name
        content = path.read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            disk.write(path, [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]])
            with pytest.raises(DamagedCheckpointError, match=rf"{name}: its bytes \d+ to \d+ have changed"):
                read_tensors(checkpoint / "weights", **one)
        disk.write(path, [content])


@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp"])
def test_damage_is_found_on_the_way(checkpoint, name):
    disk, path = disk_of(checkpoint), checkpoint / "weights" / name
    content = bytearray(path.read_bytes())
    content[-500] ^= 1
    disk.write(path, [bytes(content)])
    with pytest.raises(DamagedCheckpointError, match=rf"{name}: its bytes \d+ to \d+ have changed"):
        read_tensors(checkpoint / "weights")
    disk.write(path, [bytes(content[: len(content) // 2])])
    with pytest.raises(DamagedCheckpointError, match=name):
        read_tensors(checkpoint / "weights")
    disk.remove(path)
    with pytest.raises(DamagedCheckpointError, match=rf"{name} cannot be read"):
        read_tensors(checkpoint / "weights")


def test_without_a_manifest_it_is_read_all_the_same(checkpoint):
    disk_of(checkpoint).remove(checkpoint / "manifest.json")
    assert torch.equal(read_tensors(checkpoint / "weights")["state_dict.large"], TENSORS["large"])


def test_a_header_that_is_not_ours_is_read_as_torch_does(checkpoint, monkeypatch):
    ordinary = []
    read = reading.read_ordinary
    monkeypatch.setattr(reading, "read_ordinary", lambda weights, t: ordinary.append(set(t)) or read(weights, t))
    fetch = fetching._fetch
    monkeypatch.setattr(fetching, "_fetch", lambda *all: fetch(*all) | {"state_dict.half"})
    tensors = read_tensors(checkpoint / "weights")
    assert ordinary == [{"state_dict.half"}]
    assert torch.equal(tensors["state_dict.half"], TENSORS["half"])


def test_a_recorder_is_fed_once(checkpoint):
    """The checksums of the manifest are those of what the store has."""
    for file, record in manifests.read(checkpoint).files.items():
        recorder = Recorder()
        list(recorder.over([(checkpoint / file).read_bytes()]))
        assert recorder.record == record, file
