"""A store: objects, retries, and paths that read."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.s3 import SLOW

from nemologger import ConfigurationError
from nemologger.stores import store
from nemologger.stores.client import Body, while_it_moves
from nemologger.stores.path import StorePath, in_store, storage_path
from nemologger.stores.remote_disk import OverlappingDisk, RemoteDisk, disk_of
from nemologger.stores.store import Store

LARGE = os.urandom(13 << 20)


@pytest.fixture(params=["s3", "memory"])
def root(request):
    """An empty directory in a store."""
    if request.param == "s3":
        yield storage_path(request.getfixturevalue("s3").url)
    else:
        path = storage_path("memory://bucket/runs")
        yield path
        disk_of(path).remove(path)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(store, "WHOLE", 6 << 20)
    monkeypatch.setattr(store, "PART", 5 << 20)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(store, "PATIENCE", 1.0)


def names_in(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()]


def test_what_is_written_is_read(root, small_parts):
    disk = disk_of(root)
    disk.write(root / "a" / "large", [memoryview(LARGE)[:1000], memoryview(LARGE)[1000:]])
    disk.write(root / "a" / "small", [b"one", memoryview(b" two"), b""])
    disk.write(root / "a" / "empty", [])
    assert (root / "a" / "large").read_bytes() == LARGE
    assert (root / "a" / "small").read_text() == "one two"
    assert (root / "a" / "empty").read_bytes() == b""
    assert (root / "a" / "large").stat().st_size == len(LARGE)
    assert (root / "a").sizes() == {"large": len(LARGE), "small": 7, "empty": 0}
    with (root / "a" / "large").open("rb", buffering=0) as file:
        file.seek(3)
        assert file.read(12 << 20) == LARGE[3 : 3 + (12 << 20)]
        assert file.read(12 << 20) == LARGE[3 + (12 << 20) :]
        assert file.read(1) == b""


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


def test_a_stream_that_fails_leaves_no_half(small_parts):
    root = storage_path("memory://bucket/runs")

    def parts():
        yield LARGE
        raise OSError(errno.EIO, "the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        disk_of(root).write(root / "a", parts())
    assert not (root / "a").exists()


def test_a_commit_happens_once(root):
    disk = disk_of(root)
    disk.commit(root / "manifest.json", b"one")
    disk.commit(root / "manifest.json", b"one")  # the answer to the first was lost
    with pytest.raises(FileExistsError):
        disk.commit(root / "manifest.json", b"two")
    assert (root / "manifest.json").read_bytes() == b"one"


def test_a_server_that_does_not_say_which_condition_did_not_hold(s3):
    root = storage_path(s3.url)
    disk = disk_of(root)
    answers = iter(["lose"])
    s3.gate.rule = lambda request: next(answers, "bare")
    disk.commit(root / "manifest.json", b"one")  # and its answer is lost: the second try finds it there
    assert len([request for request in s3.gate.requests if request.startswith("PUT")]) == 2
    with pytest.raises(FileExistsError) as error:
        disk.commit(root / "manifest.json", b"two")
    assert error.value.filename == f"{root}/manifest.json"
    assert (root / "manifest.json").read_bytes() == b"one"


def test_a_large_object_that_is_there_is_not_overwritten(s3, small_parts):
    root = storage_path(s3.url)
    where = in_store(root).store
    where.write(f"{root}/a", [b"first"])
    with pytest.raises(FileExistsError, match="pre-condition"):
        where.write(f"{root}/a", [LARGE], create=True)
    assert (root / "a").read_bytes() == b"first"
    assert s3.pending() == []


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


def test_a_store_renames_nothing(root):
    disk = disk_of(root)
    assert not disk.can_rename
    disk.write(root / "a", [b"x"])
    with pytest.raises(OSError, match="renames nothing"):
        disk.rename(root / "a", root / "b")
    disk.link(root / "a", root / "b")
    assert (root / "b").read_bytes() == b"x"


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


def test_a_server_that_refuses_for_a_moment(s3):
    answers = iter(["refuse"] * 3)
    s3.gate.rule = lambda request: next(answers, "pass")
    root = storage_path(s3.url)
    disk_of(root).write(root / "a", [b"x"])
    assert s3.objects() == ["a"]
    assert len(s3.gate.requests) == 4


def test_a_server_that_does_not_answer_in_time(s3, monkeypatch):
    monkeypatch.setattr(store, "LIMIT", 4.0)
    monkeypatch.setattr(store, "PATIENCE", 0.0)  # once more all the same
    answers = iter(["hold"])
    s3.gate.rule = lambda request: next(answers, "pass")
    root = storage_path(s3.url)
    disk_of(root).write(root / "a", [b"x"])
    assert s3.objects() == ["a"]
    assert len(s3.gate.requests) == 2
    answers = iter(["hold"])
    assert (root / "a").read_bytes() == b"x"


def test_a_slow_line_may_take_longer_than_a_request_that_moves_nothing(s3, monkeypatch):
    monkeypatch.setattr(store, "LIMIT", 0.8 * len(LARGE) / SLOW)
    where = in_store(storage_path(s3.url)).store
    s3.client.put_object(Bucket=s3.name, Key="runs/theirs", Body=LARGE)
    s3.gate.rule = lambda request: "slow"
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(where.read, f"{s3.url}/theirs", 0, len(LARGE))
        where.write(f"{s3.url}/ours", [LARGE])
    assert received.result() == LARGE
    assert s3.client.get_object(Bucket=s3.name, Key="runs/ours")["Body"].read() == LARGE


def test_a_request_whose_bytes_stop_on_their_way_is_given_up():
    async def send(body: Body) -> None:
        try:
            body.read(5)
            await asyncio.Event().wait()
        finally:
            body.close()

    body = Body(b"0123456789")
    with pytest.raises(TimeoutError, match=r"nothing has moved for 0 s"):
        asyncio.run(while_it_moves(send(body), body, 0.2))
    assert body.closed, "the request is still under way"


def test_a_server_that_is_gone_is_given_up(s3, impatient):
    root = storage_path(s3.url)
    s3.gate.rule = lambda request: "refuse"
    start = time.monotonic()
    with pytest.raises(OSError, match=r"tried for \d") as error:
        disk_of(root).write(root / "a", [b"x"])
    assert error.value.filename == f"{s3.url}/a"
    assert time.monotonic() - start < 10
    tries = len(s3.gate.requests)
    assert tries > 2
    with pytest.raises(OSError, match="tried for 0"):  # it is known to be gone: nobody waits for it again
        in_store(root).store.read(f"{root}/a")
    for call in (root.exists, root.is_dir, lambda: list(root.iterdir())):  # not known is not the same as not there
        with pytest.raises(OSError, match="tried for 0"):
            call()
    s3.gate.rule = lambda request: "pass"
    assert not root.exists()


def test_what_cannot_change_is_not_tried_again(s3):
    root = storage_path(s3.url)
    s3.gate.rule = lambda request: "deny"
    with pytest.raises(PermissionError, match="not for you") as error:
        disk_of(root).write(root / "a", [b"x"])
    assert error.value.filename == f"{root}/a"
    assert len(s3.gate.requests) == 1


def test_the_answer_to_a_write_is_lost(s3, small_parts):
    """It was done, and is not done twice, and is not taken for somebody else's."""
    root = storage_path(s3.url)
    disk = disk_of(root)
    lost = iter(["lose"])
    s3.gate.rule = lambda request: next(lost, "pass") if request.startswith("PUT") else "pass"
    disk.commit(root / "manifest.json", b"m")
    assert len([request for request in s3.gate.requests if request.startswith("PUT")]) == 2
    lost = iter(["lose"])
    s3.gate.rule = lambda request: (
        next(lost, "pass") if request.startswith("POST") and "uploadId" in request else "pass"
    )
    disk.write(root / "large", [LARGE])
    assert (root / "large").read_bytes() == LARGE
    assert s3.pending() == []


def test_options_come_before_the_environment(s3):
    root = storage_path(s3.url, {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"})
    assert in_store(root / "a").store.options["endpoint_url"] == "http://127.0.0.1:9"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PATIENCE", 0.0)
        with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
            root.exists()
    assert s3.gate.requests == []


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
    assert disk.path("s3://bucket/a") == storage_path("s3://bucket/a", {"key": "k"})
    assert disk_of(Path("a")) is None


FIRST_USE = """
import sys, time

class Slow:  # a busy machine
    def find_spec(self, name, *rest):
        if name.startswith("fsspec."):
            time.sleep(0.1)

sys.meta_path.insert(0, Slow())
from concurrent.futures import ThreadPoolExecutor
from nemologger.stores.store import Store
from nemologger.stores.client import Body, while_it_moves
store = Store(sys.argv[1])
with ThreadPoolExecutor(8) as pool:
    def use(name):
        if name in "aceg":  # one way in, and the other
            store.check(f"{sys.argv[1]}/{name}")
        store.write(f"{sys.argv[1]}/{name}", [b"x"])
    print(list(pool.map(use, "abcdefgh")))
"""


def test_its_first_use_may_be_in_many_threads(s3):
    """As in the writer process, where nobody has imported the client before."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE, f"s3://{s3.name}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(s3.objects()) == 8
