"""Paths in a store, that read."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

import pytest

from nemologger import ConfigurationError
from nemologger.stores.path import StorePath, in_store, storage_path
from nemologger.stores.remote_disk import disk_of


def names_in(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()]


def test_names_with_signs_that_mean_something_to_a_shell(root):
    disk = disk_of(root)
    for name in ("a[1]*?", "a1", "b c+ü%20#"):
        disk.write(root / name / "file", [name.encode()])
    assert names_in(root) == ["a1", "a[1]*?", "b c+ü%20#"]
    for path in root.iterdir():
        assert (path / "file").read_text() == path.name
    disk.remove(root / "a[1]*?")
    disk.remove(root / "b c+ü%20#")
    assert names_in(root) == ["a1"]


def test_a_last_that_points_elsewhere_is_followed(root):
    disk = disk_of(root)
    disk.write(root / "one" / "weights" / "a", [b"1"])
    disk.write(root / "two" / "weights" / "a", [b"2"])
    last = root / "x-last"
    assert not last.is_symlink()
    assert not last.exists()
    for target in ("one", "two"):
        disk.symlink(last, target)
        assert last.is_symlink()
        assert last.is_dir()
        assert last.resolve() == last.readlink() == root / target
        assert (last / "weights" / "a").read_bytes() == (root / target / "weights" / "a").read_bytes()
        assert names_in(last) == ["weights"]
        assert last.samefile(root / target)
    disk.symlink(last, "gone")
    assert last.is_symlink()
    assert not last.exists()
    disk.write(root / "own-last" / "a", [b"3"])  # a directory of its own
    assert not (root / "own-last").is_symlink()
    assert (root / "own-last" / "a").is_file()


def test_looking_around(root):
    disk = disk_of(root)
    for name in ("a/context/io.json", "b/context/io.json", "b/x", ".hidden"):
        disk.write(root / name, [b"x"])
    assert [str(path.relative_to(root)) for path in root.glob("*/context/io.json")] == [
        "a/context/io.json",
        "b/context/io.json",
    ]
    assert [path.name for path in root.glob("*")] == [".hidden", "a", "b"]
    assert [str(path.relative_to(root)) for path in root.rglob("*")] == [
        ".hidden",
        "a/context/io.json",
        "b/context/io.json",
        "b/x",
    ]
    assert (root / "a").is_dir()
    assert not (root / "a").is_file()
    assert not (root / "c").exists()
    assert list((root / "c").iterdir()) == []
    assert (root / "a").stat().st_mtime == pytest.approx(time.time(), abs=600)
    with pytest.raises(FileNotFoundError):
        (root / "c").read_bytes()
    with pytest.raises(ValueError, match="RemoteDisk"):
        (root / "a").open("wb")


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://bucket//a", "s3://bucket/a"),
        ("file:///tmp/a", "/tmp/a"),
        ("runs/a", "runs/a"),
        (Path("runs/a"), "runs/a"),
        ("C:/odd", "C:/odd"),
    ],
)
def test_what_a_path_means(where, text):
    assert str(storage_path(where)) == text


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("s3://", "names no bucket"),
        ("nosuch://bucket/a", "nosuch"),
        ("simplecache::s3://bucket/a", "chained"),
        (Path("s3://bucket/a"), "as a string"),
    ],
)
def test_a_url_that_cannot_work(where, why):
    with pytest.raises(ConfigurationError, match=why):
        storage_path(where)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nemologger\[s3\]'"):
        storage_path("s3://bucket/a")


def test_a_path_is_a_value():
    path = storage_path("s3://bucket/a/b.ckpt", {"key": "k"})
    again = pickle.loads(pickle.dumps(path))
    assert again == path
    assert hash(again) == hash(path)
    assert in_store(again).store.options == {"key": "k"}
    assert path != storage_path("s3://bucket/a/b.ckpt")
    assert (path.name, path.suffix, str(path.parent)) == ("b.ckpt", ".ckpt", "s3://bucket/a")
    assert [str(above) for above in path.parents] == ["s3://bucket/a", "s3://bucket"]
    assert path.with_name("c") == path.parent / "c"
    assert path.absolute() == path.expanduser() == path
    assert "key" not in repr(path)
    with pytest.raises(ValueError, match="not below"):
        path.relative_to(storage_path("s3://other/a", {"key": "k"}))
    assert isinstance(path, StorePath)
