"""A store as a disk: what replaces, commits, removes, and waits for what is under way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nemologger.stores.path import in_store, storage_path
from nemologger.stores.remote_disk import OverlappingDisk, RemoteDisk, disk_of
from nemologger.stores.store import Store

LARGE = os.urandom(13 << 20)


def names_in(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()]


def test_a_write_replaces_and_one_that_fails_does_not(s3, small_parts):
    root = storage_path(s3.url)
    disk = disk_of(root)
    disk.write(root / "a", [b"before"])

    def parts():
        yield LARGE
        raise OSError(errno.EIO, "the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        disk.write(root / "a", parts())
    assert (root / "a").read_bytes() == b"before"
    assert s3.pending() == []
    disk.write(root / "a", [b"after"])
    assert (root / "a").read_bytes() == b"after"


def test_a_commit_happens_once(root):
    disk = disk_of(root)
    disk.commit(root / "manifest.json", b"one")
    disk.commit(root / "manifest.json", b"one")  # the answer to the first was lost
    with pytest.raises(FileExistsError):
        disk.commit(root / "manifest.json", b"two")
    assert (root / "manifest.json").read_bytes() == b"one"


def test_removing_takes_all_below_and_no_neighbour(root):
    disk = disk_of(root)
    for name in ("step=1/weights/a", "step=1/b", "step=10/a", "step=1-unfinished"):
        disk.write(root / name, [b"x"])
    disk.symlink(root / "step=1-last", "step=1")
    disk.remove(root / "step=1")
    disk.remove(root / "never")
    assert names_in(root) == ["step=1-last", "step=1-unfinished", "step=10"]
    disk.remove(root / "step=1-last")
    disk.remove(root / "step=1-unfinished")
    assert names_in(root) == ["step=10"]


def test_removing_ends_what_was_begun_below(s3):
    root = storage_path(s3.url)
    for key in ("runs/step=1/weights/a", "runs/step=10/weights/a"):
        s3.client.create_multipart_upload(Bucket=s3.name, Key=key)
    disk_of(root).remove(root / "step=1")
    assert s3.pending() == ["runs/step=10/weights/a"]


def test_a_store_renames_nothing(root):
    disk = disk_of(root)
    assert not disk.can_rename
    disk.write(root / "a", [b"x"])
    with pytest.raises(OSError, match="renames nothing"):
        disk.rename(root / "a", root / "b")
    disk.link(root / "a", root / "b")
    assert (root / "b").read_bytes() == b"x"


def test_uploads_that_overlap_are_waited_for(root, small_parts):
    disk = OverlappingDisk(in_store(root).store)
    for name in "abcd":
        disk.write(root / name, [memoryview(LARGE)[:1000], memoryview(LARGE)[1000:], name.encode()])
    disk.sync(root)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {n: LARGE + n.encode() for n in "abcd"}
    disk.write(root / "e", [b"e"])
    disk.commit(root / "manifest.json", b"m")
    assert (root / "e").read_bytes() == b"e"


def test_an_upload_that_fails_is_told_at_the_next_sync(s3, impatient):
    root = storage_path(s3.url)
    disk = OverlappingDisk(in_store(root).store)
    s3.gate.rule = lambda request: "deny"
    disk.write(root / "a", (b"x" for _ in range(100)))
    with pytest.raises(PermissionError, match="not for you"):
        disk.sync(root)
    disk.sync(root)  # once
    disk.write(root / "a", [b"x"])
    s3.gate.rule = lambda request: "pass"
    disk.remove(root / "a")
    disk.sync(root)
    assert s3.objects() == []


def test_parts_that_cannot_be_read_end_an_upload(root):
    disk = OverlappingDisk(in_store(root).store)

    def parts():
        yield b"x"
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        disk.write(root / "a", parts())
    with pytest.raises(OSError, match="the source is gone"):
        disk.sync(root)
    assert not (root / "a").exists()


def test_a_disk_knows_its_paths():
    disk = RemoteDisk(Store("s3://bucket", {"key": "k"}))
    path = disk.path("s3://bucket/a")
    assert path == storage_path("s3://bucket/a", {"key": "k"})
    assert in_store(path).store is disk.store, "another one opens a client of its own"
    assert in_store(disk.path("s3://other/a")).store.root == "s3://other"
    assert disk_of(Path("a")) is None
