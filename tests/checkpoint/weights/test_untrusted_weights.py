"""``weights/`` that strangers wrote, or that are damaged: nothing of them runs, and what is wrong is named."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
import torch
from helpers.engine import save
from helpers.weights import write
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.reading.read import read_tensors
from nemologger.checkpoint.weights import described, read_metadata
from nemologger.errors import CheckpointError, DamagedCheckpointError, NotFoundError, RefusedError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    """A file that appears if anything runs."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the file has run"


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()


def _rewrite(path: Path, content: bytes) -> None:
    """Put other bytes into a checkpoint, which has no manifest then: a stranger's needs none."""
    (path.parent.parent / "manifest.json").unlink()
    path.write_bytes(content)


def test_a_metadata_with_code_is_refused(tmp_path, canary):
    save(tmp_path / "a", 1)
    weights = tmp_path / "a" / "weights"
    _rewrite(weights / ".metadata", pickle.dumps(Metadata({}, planner_data=Bomb(canary))))
    for read in (read_metadata, read_tensors, described, lambda path: load_checkpoint(path.parent)):
        with pytest.raises(RefusedError, match=r"\.metadata names (posix|nt)\.system"):
            read(weights)


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "torch load", "torch.hub load", "pathlib os.system", "collections namedtuple", "torch _dynamo"],
)
def test_metadata_admits_only_its_own_classes(tmp_path, name):
    module, _, symbol = name.partition(" ")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{symbol}\n.".encode())
    with pytest.raises(RefusedError, match=re.escape(f"{module}.{symbol}")):
        read_metadata(tmp_path)


class _OldPickler(pickle.Pickler):
    """Pickles members of enums as Python before 3.11.4 does."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_a_metadata_of_an_older_python_is_read(tmp_path):
    save(tmp_path / "a", 1)
    path = tmp_path / "a" / "weights" / ".metadata"
    buffer = io.BytesIO()
    _OldPickler(buffer, protocol=4).dump(pickle.loads(path.read_bytes()))
    assert b"getattr" in buffer.getvalue()
    before = read_metadata(path.parent)
    _rewrite(path, buffer.getvalue())
    assert read_metadata(path.parent) == before


@pytest.mark.parametrize(
    "attribute", ["(ctorch\nSize\nS'__init__'\n", "(S'x'\nS'join'\n", "(cbuiltins\ngetattr\nS'__globals__'\n"]
)
def test_attributes_of_anything_else_are_refused(tmp_path, attribute):
    (tmp_path / ".metadata").write_bytes(f"cbuiltins\ngetattr\n{attribute}tR.".encode())
    with pytest.raises(RefusedError, match=r"builtins\.getattr of"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("name", ["pathlib PosixPath", "torch.serialization _get_layout", "torch Size"])
def test_a_metadata_cannot_change_what_the_program_uses(tmp_path, name):
    """A pickle may set attributes of what it names: here ``evil`` of a class or function."""
    module, _, symbol = name.partition(" ")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{symbol}\n(N(dVevil\nI1\nstb.".encode())
    with pytest.raises(DamagedCheckpointError):
        read_metadata(tmp_path)
    for used in (Path, type(tmp_path), torch.serialization._get_layout, torch.Size):
        assert not hasattr(used, "evil")


def _attribute(module: str, name: str, attribute: str, value: str = "N") -> bytes:
    """A pickle that sets an attribute of what it names."""
    return f"c{module}\n{name}\n(N(dV{attribute}\n{value}stb.".encode()


@pytest.mark.parametrize("name", ["Metadata __init__", "MetadataIndex __hash__", "_MEM_FORMAT_ENCODING new"])
def test_a_metadata_cannot_change_the_classes_it_is_made_of(tmp_path, name):
    kind, attribute = name.split()
    module = Metadata.__module__
    before = dict(vars(vars(sys.modules[module])[kind]))
    (tmp_path / ".metadata").write_bytes(_attribute(module, kind, attribute))
    with pytest.raises(RefusedError, match=rf"\.metadata changes {kind}, which no checkpoint needs"):
        read_metadata(tmp_path)
    assert dict(vars(vars(sys.modules[module])[kind])) == before
    write(tmp_path / "weights", {"a": torch.ones(3)})
    assert torch.equal(read_tensors(tmp_path / "weights")["state_dict.a"], torch.ones(3))


def test_a_metadata_cannot_change_the_members_of_an_enum(tmp_path):
    member = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    enum = f"c{Metadata.__module__}\n_MEM_FORMAT_ENCODING\n"
    (tmp_path / ".metadata").write_bytes(f"{enum}(I{member.value}\ntR(dV_value_\nI0\nsb.".encode())
    before = member.value
    with pytest.raises(RefusedError, match="TORCH_CHANNELS_LAST"):
        read_metadata(tmp_path)
    assert member.value == before


@pytest.mark.parametrize(("size", "error"), [(1 << 50, "MemoryError"), (1 << 63, "OverflowError")])
def test_a_metadata_that_asks_for_all_memory_is_damaged(tmp_path, size, error):
    (tmp_path / ".metadata").write_bytes(b"\x8e" + size.to_bytes(8, "little") + b"x.")
    with pytest.raises(DamagedCheckpointError, match=error):
        read_metadata(tmp_path)


@pytest.mark.parametrize("keep", [b"r" + (5 << 20).to_bytes(4, "little"), b"p5_000_000\n"])
def test_a_metadata_that_numbers_more_than_it_has_is_damaged(tmp_path, keep):
    """Python would set memory aside for all of these numbers: tens of GB, where one flipped bit makes a call a number."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04\x8c\x01rN\x94" + keep + b".")
    with pytest.raises(
        DamagedCheckpointError, match=r"\.metadata cannot be read: it keeps something under the number 5"
    ):
        read_metadata(tmp_path)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_metadata_may_be_of_any_protocol_that_pickles_such(tmp_path, protocol):
    write(tmp_path, {f"layer_{number}": torch.ones(number, 2) for number in range(300)})
    path, before = tmp_path / ".metadata", read_metadata(tmp_path)
    path.write_bytes(pickle.dumps(before, protocol))
    assert read_metadata(tmp_path) == before


_GOOD = "state_dict.good"


def _nested(depth: int = 60) -> tuple:
    """Small in a pickle; its text would have 2**60 pairs of brackets."""
    return (one := _nested(depth - 1), one) if depth else ()


_HARM = {
    "the key": lambda read: read.state_dict_metadata.update({1: read.state_dict_metadata[_GOOD]}),
    "the entry": lambda read: read.state_dict_metadata.update({_GOOD: read.storage_data}),
    "the dtype": lambda read: setattr(read.state_dict_metadata[_GOOD].properties, "dtype", torch.strided),
    "the size": lambda read: setattr(read.state_dict_metadata[_GOOD], "size", torch.Size([-1])),
    "the entry, nested": lambda read: read.state_dict_metadata.update({_GOOD: _nested()}),
    "no size": lambda read: setattr(read.state_dict_metadata[_GOOD], "size", None),
    "the dimensions": lambda read: setattr(read.state_dict_metadata[_GOOD], "size", torch.Size([3, 1])),
    "the chunks": lambda read: setattr(read.state_dict_metadata[_GOOD], "chunks", [torch.Size([3])]),
    "the index": lambda read: object.__setattr__(next(iter(read.storage_data)), "offset", 0),
    "the file": lambda read: read.storage_data.update({MetadataIndex("a"): _StorageInfo(None, 0, 1)}),
    "the place": lambda read: read.storage_data.update({MetadataIndex("a"): _StorageInfo("a", -1, 1)}),
}


@pytest.mark.parametrize("harm", _HARM)
def test_a_metadata_with_something_of_another_kind_is_damaged(tmp_path, harm):
    """As flipped bits leave it, where there is no manifest to compare with."""
    write(tmp_path, {"good": torch.ones(3)})
    read = read_metadata(tmp_path)
    _HARM[harm](read)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(read))
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata cannot be read: "):
        load_checkpoint(tmp_path)


def test_a_tensor_that_no_memory_holds_is_named(tmp_path):
    write(tmp_path, {"good": torch.ones(3)})
    read = read_metadata(tmp_path)
    read.state_dict_metadata[_GOOD].size = torch.Size([1 << 60])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(read))
    with pytest.raises(CheckpointError, match=rf"{_GOOD} of {tmp_path}, torch\.float32 of the size .* cannot be made"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("common", "said"),
    [
        ([1], "common.pt holds a list"),
        (
            {"optimizer_states": [{"__nemologger__": "tensor", "key": "gone"}]},
            "common.pt cannot be read: KeyError: 'gone'",
        ),
        ({"nemologger": [1]}, "common.pt"),
    ],
)
def test_a_common_pt_that_does_not_fit_is_damaged(tmp_path, common, said):
    write(tmp_path, {"good": torch.ones(3)})
    (tmp_path / "common.pt").write_bytes(_torch_saved(common))
    with pytest.raises(DamagedCheckpointError, match=re.escape(said)):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [b"state_dict_metadata", b"properties"])
def test_a_metadata_without_a_part_that_it_must_have_is_damaged(tmp_path, name):
    """As one flipped bit in its name leaves it, where there is no manifest to compare with."""
    save(tmp_path / "a", 1)
    path = tmp_path / "a" / "weights" / ".metadata"
    path.write_bytes(path.read_bytes().replace(name, name[:-1] + b"_"))
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata cannot be read: AttributeError"):
        described(path.parent)


def test_a_common_pt_with_code_is_refused(tmp_path, canary):
    save(tmp_path / "a", 1)
    buffer = io.BytesIO()
    torch.save({"epoch": 0, "callbacks": Bomb(canary)}, buffer)
    _rewrite(tmp_path / "a" / "weights" / "common.pt", buffer.getvalue())
    with pytest.raises(RefusedError, match=r"common\.pt holds more than plain types") as caught:
        load_checkpoint(tmp_path / "a")
    assert "system" in str(caught.value)


def _with_entry(weights: Path, content: bytes, *, as_bytes: bool) -> Path:
    """Weights of one good tensor and one entry that holds ``content``."""
    write(weights, {"good": torch.ones(3)})
    read = read_metadata(weights)
    (weights / "__9_0.distcp").write_bytes(content)
    entry = (
        BytesStorageMetadata()
        if as_bytes
        else TensorStorageMetadata(
            TensorProperties(dtype=torch.float32),
            torch.Size([3]),
            [ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))],
        )
    )
    index = MetadataIndex("state_dict.evil", None if as_bytes else torch.Size([0]))
    read.state_dict_metadata["state_dict.evil"] = entry
    read.storage_data[index] = _StorageInfo("__9_0.distcp", 0, len(content))
    (weights / ".metadata").write_bytes(pickle.dumps(read))
    return weights


def _torch_saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_tensor_entry_with_code_is_refused_and_named(tmp_path, canary):
    weights = _with_entry(tmp_path / "weights", _torch_saved(Bomb(canary)), as_bytes=False)
    with pytest.raises(RefusedError, match=r"entry state_dict\.evil holds more than plain types"):
        read_tensors(weights)


def test_a_bytes_entry_is_not_even_read(tmp_path, canary):
    weights = _with_entry(tmp_path / "weights", _torch_saved(Bomb(canary)), as_bytes=True)
    assert set(read_tensors(weights)) == {"state_dict.good"}


@pytest.mark.parametrize("content", [_torch_saved([1, 2]), _torch_saved(torch.ones(2)), b"", b"rubbish" * 100])
def test_an_entry_that_is_no_such_tensor_is_damaged_and_named(tmp_path, content):
    weights = _with_entry(tmp_path / "weights", content, as_bytes=False)
    with pytest.raises(DamagedCheckpointError, match=r"entry state_dict\.evil"):
        read_tensors(weights)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp", "__0_1.distcp"])
@pytest.mark.parametrize("harm", ["removed", "emptied", "cut"])
def test_damage_is_an_error_that_names_the_directory(tmp_path, file, harm):
    """Also without a manifest to compare with."""
    save(tmp_path / "a", 1)
    path = tmp_path / "a" / "weights" / file
    content = path.read_bytes()
    path.unlink()
    if harm != "removed":
        path.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    with pytest.raises((DamagedCheckpointError, NotFoundError), match="weights"):
        load_checkpoint(tmp_path / "a")


def test_a_metadata_of_another_kind_is_damaged(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    with pytest.raises(DamagedCheckpointError, match="holds a dict"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("chunks", [[], [ChunkStorageMetadata(torch.Size([1]), torch.Size([3]))]])
def test_a_tensor_that_no_file_holds_as_a_whole_is_damaged(tmp_path, chunks):
    """It would come back as whatever was in memory."""
    write(tmp_path, {"good": torch.ones(3)})
    read = read_metadata(tmp_path)
    read.state_dict_metadata["state_dict.good"].chunks = chunks
    (tmp_path / ".metadata").write_bytes(pickle.dumps(read))
    with pytest.raises(DamagedCheckpointError, match=r"of state_dict\.good, 0 of 3 elements"):
        read_tensors(tmp_path)


def _in_parts(directory: Path, parts: list[tuple[int, int]], *, columns: bool, crc: bool) -> tuple[Path, Metadata]:
    """Weights in which a tensor of 6 x 6 ones is kept in ``parts``, rows or columns from one to before another."""
    write(directory, {"good": torch.ones(6, 6)})
    (weights := directory / "b").mkdir()
    (weights / "common.pt").write_bytes((directory / "common.pt").read_bytes())
    read = read_metadata(directory)
    entry = read.state_dict_metadata[_GOOD]
    read.storage_data.clear()
    entry.chunks.clear()

    def turned(size):
        return torch.Size(reversed(size) if columns else size)

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    for number, (start, end) in enumerate(parts):
        part = torch.ones(turned((end - start, 6)))
        file = f"__{number}_0.distcp"
        (weights / file).write_bytes(content := _torch_saved(part))
        entry.chunks.append(ChunkStorageMetadata(turned((start, 0)), part.shape))
        read.storage_data[MetadataIndex(_GOOD, turned((start, 0)))] = _StorageInfo(file, 0, len(content))
    torch.serialization.set_crc32_options(before)
    (weights / ".metadata").write_bytes(pickle.dumps(read))
    return weights, read


@pytest.mark.parametrize("crc", [False, True])  # without, they lie as those that we write
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    ("parts", "is_whole"),
    [([(0, 2), (2, 3), (3, 6)], True), ([(0, 2), (1, 4), (4, 6)], False), ([(0, 2), (1, 3), (4, 6)], False)],
)
def test_a_tensor_of_parts_that_overlap_is_refused_by_name(tmp_path, parts, is_whole, columns, crc):
    """Which of them counts would be chance; as many elements as it has may leave some that nobody has written."""
    weights, _ = _in_parts(tmp_path, parts, columns=columns, crc=crc)
    if is_whole:
        assert torch.equal(read_tensors(weights)[_GOOD], torch.ones(6, 6))
    else:
        with pytest.raises(DamagedCheckpointError, match=rf"\.metadata: parts of {_GOOD} overlap"):
            read_tensors(weights)


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_a_part_that_is_named_twice_does_not_stand_for_one_that_is_missing(tmp_path, columns, crc):
    """As many elements as the tensor has: those of the missing part would stay as they are in memory."""
    weights, _ = _in_parts(tmp_path, [(0, 3), (0, 3)], columns=columns, crc=crc)
    mine = torch.full((6, 6), 7.0)
    with pytest.raises(DamagedCheckpointError, match=rf"\.metadata: of {_GOOD}, 18 of 36 elements are in the files"):
        read_tensors(weights, into=lambda stored: {_GOOD: mine})


def test_a_part_that_lies_in_two_places_is_refused_by_name(tmp_path):
    weights, read = _in_parts(tmp_path, [(0, 3), (3, 6)], columns=False, crc=False)
    _, other = read.storage_data.popitem()
    read.storage_data[MetadataIndex(_GOOD)] = other  # without an offset it begins with the tensor
    (weights / ".metadata").write_bytes(pickle.dumps(read))
    with pytest.raises(DamagedCheckpointError, match=rf"\.metadata: a part of {_GOOD} is in two places"):
        read_tensors(weights)


def test_a_part_that_is_named_twice_is_read_once(tmp_path):
    """Tools that let every rank name what all of them hold have written such."""
    weights, _ = _in_parts(tmp_path, [(0, 3), (0, 3), (3, 6)], columns=False, crc=False)
    assert torch.equal(read_tensors(weights)[_GOOD], torch.ones(6, 6))


@pytest.mark.parametrize("elsewhere", ["../__9_0.distcp", "{}/__9_0.distcp"])
def test_a_file_outside_of_the_weights_is_not_read(tmp_path, elsewhere):
    weights = _with_entry(tmp_path / "weights", _torch_saved(torch.ones(3)), as_bytes=False)
    (weights / "__9_0.distcp").rename(tmp_path / "__9_0.distcp")
    read = read_metadata(weights)
    for index, info in read.storage_data.items():
        if info.relative_path == "__9_0.distcp":
            read.storage_data[index] = replace(info, relative_path=elsewhere.format(tmp_path))
    (weights / ".metadata").write_bytes(pickle.dumps(read))
    with pytest.raises(RefusedError, match="names a file outside of"):
        read_tensors(weights)
