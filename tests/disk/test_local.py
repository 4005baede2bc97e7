"""The disk: what it writes is all there or not at all."""

from __future__ import annotations

import errno
import gc
import os

import pytest
from helpers.disks import FailingDisk, RecordingDisk, full

from nemologger.checkpoint.writing.memory_disk import MemoryDisk
from nemologger.disk import Disk, LocalDisk
from nemologger.disk.local import write_all
from nemologger.stores.remote_disk import RemoteDisk
from nemologger.stores.store import Store

DISK = LocalDisk()


@pytest.mark.parametrize(
    "disk", [LocalDisk(), FailingDisk(99), RecordingDisk(), MemoryDisk(), RemoteDisk(Store("memory://"))]
)
def test_every_disk_is_one(disk):
    typed: Disk = disk
    methods = [name for name in vars(Disk) if not name.startswith("_")]
    assert sorted(methods) == [
        "can_link", "can_symlink", "commit", "link", "make_directory", "path",
        "remove", "rename", "symlink", "sync", "write",
    ]  # fmt: skip
    assert typed.can_rename in (True, False)
    assert all(callable(getattr(typed, name)) for name in methods)


def test_parts_are_written_one_after_the_other(tmp_path):
    DISK.write(tmp_path / "a", [b"one", memoryview(b" two"), b"", bytearray(b" three")])
    assert (tmp_path / "a").read_bytes() == b"one two three"
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_to_write_is_an_empty_file(tmp_path):
    DISK.write(tmp_path / "a", [])
    assert (tmp_path / "a").read_bytes() == b""


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    DISK.write(tmp_path / "a", [b"before"])

    def parts():
        yield b"after"
        raise full()

    with pytest.raises(OSError, match="No space left"):
        DISK.write(tmp_path / "a", parts())
    assert (tmp_path / "a").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path):
    def parts():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DISK.write(tmp_path / "a", parts())
    assert os.listdir(tmp_path) == []


def test_a_small_pipe_takes_everything_in_the_end():
    """The kernel may take less than it is given."""
    reader, writer = os.pipe()
    os.set_blocking(writer, True)
    data = bytes(range(256)) * 100
    write_all(writer, memoryview(data))
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == data


def test_a_link_shares_the_bytes(tmp_path):
    DISK.write(tmp_path / "a", [b"x"])
    DISK.link(tmp_path / "a", tmp_path / "b")
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")
    assert DISK.can_link(tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    DISK.remove(tmp_path / "a")
    assert (tmp_path / "b").read_bytes() == b"x"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.EACCES, errno.EIO])
def test_without_hard_links_a_link_is_a_copy(tmp_path, monkeypatch, code):
    def refuse(source, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    DISK.write(tmp_path / "a", [b"x" * 100])
    DISK.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"x" * 100
    assert not os.path.samefile(tmp_path / "a", tmp_path / "b")
    assert not DISK.can_link(tmp_path / "a", tmp_path / "c")


def test_a_link_that_fails_for_another_reason_fails(tmp_path):
    with pytest.raises(FileNotFoundError):
        DISK.link(tmp_path / "gone", tmp_path / "b")
    DISK.write(tmp_path / "a", [b"a"])
    DISK.write(tmp_path / "b", [b"b"])
    with pytest.raises(FileExistsError):
        DISK.link(tmp_path / "a", tmp_path / "b")


def test_a_symlink_replaces_an_earlier_one_at_once(tmp_path):
    for target in ("one", "two", "gone"):
        DISK.symlink(tmp_path / "link", target)
        assert os.readlink(tmp_path / "link") == target
    assert os.listdir(tmp_path) == ["link"]
    assert DISK.can_symlink(tmp_path / "probe", "one")
    assert os.listdir(tmp_path) == ["link"]


def test_a_rename_overwrites_nothing(tmp_path):
    DISK.make_directory(tmp_path / "a")
    DISK.make_directory(tmp_path / "b")  # os.rename would replace an empty directory
    DISK.symlink(tmp_path / "dangling", "gone")
    for there in ("b", "dangling"):
        with pytest.raises(FileExistsError):
            DISK.rename(tmp_path / "a", tmp_path / there)
    DISK.rename(tmp_path / "a", tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["b", "c", "dangling"]


def test_removing_takes_files_links_and_trees_and_what_is_not_there(tmp_path):
    DISK.make_directory(tmp_path / "tree" / "deep")
    DISK.write(tmp_path / "tree" / "deep" / "file", [b"x"])
    DISK.symlink(tmp_path / "link", "tree")
    DISK.symlink(tmp_path / "dangling", "gone")
    DISK.remove(tmp_path / "link")
    assert (tmp_path / "tree" / "deep" / "file").exists()
    for name in ("dangling", "tree", "tree", "never"):
        DISK.remove(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_directory_is_made_with_its_parents_and_again(tmp_path):
    for _ in range(2):
        DISK.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_directory_can_be_synced(tmp_path):
    DISK.sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        DISK.sync(tmp_path / "gone")


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_a_directory_is_fine(tmp_path, monkeypatch, code, raises):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    if raises:
        with pytest.raises(OSError, match=os.strerror(code)):
            DISK.sync(tmp_path)
    else:
        DISK.sync(tmp_path)


def test_no_descriptor_is_left_open(tmp_path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        DISK.write(tmp_path / "a", [b"x"])
        DISK.sync(tmp_path)
        with pytest.raises(TypeError):
            DISK.write(tmp_path / "b", [3])  # type: ignore[list-item]
    assert len(os.listdir("/proc/self/fd")) <= before
