"""A store: objects, and calls that are tried again."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as registry
from helpers.s3 import SLOW
from s3fs import S3FileSystem

from nemologger.stores import store
from nemologger.stores.path import in_store, storage_path
from nemologger.stores.remote_disk import disk_of

LARGE = os.urandom(13 << 20)


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


def test_what_is_sent_is_not_copied(s3, small_parts):
    """Eight parts are on their way at a time. The gate would be counted, so this goes past it."""
    where = in_store(storage_path(s3.url, {"endpoint_url": s3.client.meta.endpoint_url})).store
    where.write(f"{s3.url}/a", [b"x"])  # what is imported by the first use is not counted
    tracemalloc.start()
    try:
        where.write(f"{s3.url}/large", [LARGE] * 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20
    assert (storage_path(s3.url) / "large").read_bytes() == LARGE * 4


def test_a_stream_that_fails_leaves_no_half(small_parts):
    root = storage_path("memory://bucket/runs")

    def parts():
        yield LARGE
        raise OSError(errno.EIO, "the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        disk_of(root).write(root / "a", parts())
    assert not (root / "a").exists()


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


class Unknowing(MemoryFileSystem):
    """Has no mode for what is to be created."""

    protocol = "unknowing"

    def _open(self, path, mode="rb", **options):
        if mode == "xb":
            raise NotImplementedError("File mode not supported")
        return super()._open(path, mode, **options)


class Raced(MemoryFileSystem):
    """Another writes the object just after it was asked for."""

    protocol = "raced"

    def exists(self, path, **options):
        there = super().exists(path, **options)
        if not there:
            self.pipe_file(path, b"first")
        return there


class RacedLate(Raced):
    """As Google's client: that it is there is said while its bytes are sent."""

    protocol = "raced-late"

    def _open(self, path, mode="rb", **options):
        return Taken() if mode == "xb" else super()._open(path, mode, **options)


class Taken(io.BytesIO):
    def write(self, data):
        raise FileExistsError("https://upload")


@pytest.mark.parametrize("kind", [MemoryFileSystem, Unknowing, Raced, RacedLate])
def test_a_large_object_of_another_store_is_not_overwritten(monkeypatch, small_parts, kind):
    """A writer that outlives its killed run may come to it when the next run has written it."""
    monkeypatch.setitem(registry, kind.protocol, kind)
    root = in_store(storage_path(f"{kind.protocol}://bucket/runs"))
    try:
        if not issubclass(kind, Raced):
            root.store.write(f"{root}/new", [LARGE], create=True)
            assert (root / "new").read_bytes() == LARGE
            root.store.write(f"{root}/a", [b"first"])
        with pytest.raises(FileExistsError) as error:
            root.store.write(f"{root}/a", [LARGE], create=True)
        assert error.value.filename == f"{root}/a"
        assert (root / "a").read_bytes() == b"first"
    finally:
        root.store.remove(str(root))


class Careless(MemoryFileSystem):
    """Takes any mode, and overwrites."""

    protocol = "careless"

    def pipe_file(self, path, value, mode="overwrite", **options):
        super().pipe_file(path, value)


class Plain(MemoryFileSystem):
    """Knows no mode."""

    protocol = "plain"

    def pipe_file(self, path, value):
        super().pipe_file(path, value)


class Bare(MemoryFileSystem):
    """As Azure's client: what is below an object is that object, by its bare name."""

    protocol = "bare"

    def find(self, path, *arguments, **options):
        return [path] if self.isfile(path) else super().find(path, *arguments, **options)


def test_an_object_has_nothing_below(monkeypatch):
    monkeypatch.setitem(registry, "bare", Bare)
    root = storage_path("bare://bucket/runs")
    disk = disk_of(root)
    disk.write(root / "a" / "b", [b"x"])
    assert (root / "a" / "b").sizes() == {}
    assert (root / "a").sizes() == {"b": 1}
    disk.remove(root / "a" / "b")
    assert not (root / "a" / "b").exists()
    disk.remove(root)


class Answered(Exception):
    """As Azure's client says what the server has answered."""

    def __init__(self, status_code):
        super().__init__(f"The container\nRequestId:1\nErrorCode:{status_code}")
        self.status_code = status_code


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (429, 2), (503, 2)])
def test_a_refusal_is_not_tried_again(monkeypatch, status, tries):
    """Of any client that gives the number of an answer. Its first line is what is said."""

    class Refusing(MemoryFileSystem):
        protocol = "refusing"
        asked = 0

        def info(self, path, **options):
            Refusing.asked += 1
            raise Answered(status if Refusing.asked == 1 else 403)

    monkeypatch.setitem(registry, "refusing", Refusing)
    with pytest.raises(OSError, match="The container") as error:
        storage_path("refusing://bucket/runs").exists()
    assert Refusing.asked == tries
    assert "RequestId" not in str(error.value)


def test_a_client_that_has_tried_all_that_time_is_not_asked_again(monkeypatch):
    """As Azure's and Google's do by themselves while nothing answers."""

    class Trying(MemoryFileSystem):
        protocol = "trying"
        asked = 0

        def info(self, path, **options):
            Trying.asked += 1
            time.sleep(0.1)
            raise ConnectionError("nobody listens")

    monkeypatch.setitem(registry, "trying", Trying)
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    with pytest.raises(OSError, match=r"nobody listens .tried for"):
        storage_path("trying://bucket/runs").exists()
    assert Trying.asked == 1


class NoBucket(MemoryFileSystem):
    """As Google's client where there is no bucket: it names its own request."""

    def find(self, path, *arguments, **options):
        raise FileNotFoundError("https://storage/b/runs/o")


def test_a_bucket_of_google_that_is_not_there(monkeypatch):
    monkeypatch.setitem(registry, "gs", NoBucket)
    chatter = logging.getLogger("gcsfs")
    monkeypatch.setattr(chatter, "level", logging.NOTSET)
    root = storage_path("gs://bucket/runs")
    with pytest.raises(FileNotFoundError, match="there is no bucket "):
        disk_of(root).make_directory(root)
    assert chatter.level == logging.CRITICAL, "it logs a traceback for each request that fails"


@pytest.mark.parametrize("kind", [Careless, Plain])
def test_a_client_that_creates_nothing_only_if_it_is_not_there(monkeypatch, kind):
    monkeypatch.setitem(registry, kind.protocol, kind)
    root = storage_path(f"{kind.protocol}://bucket/runs")
    disk = disk_of(root)
    try:
        disk.commit(root / "manifest.json", b"one")
        with pytest.raises(FileExistsError):
            disk.commit(root / "manifest.json", b"two")
        assert (root / "manifest.json").read_bytes() == b"one"
    finally:
        disk.remove(root)


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


def test_a_server_that_is_gone_is_given_up(s3, impatient, monkeypatch):
    monkeypatch.setattr(store, "_KNOWN_DOWN", 60.0)
    root = storage_path(s3.url)
    s3.gate.rule = lambda request: "refuse"
    start = time.monotonic()
    with pytest.raises(OSError, match=r"tried for \d") as error:
        disk_of(root).write(root / "a", [b"x"])
    assert error.value.filename == f"{s3.url}/a"
    assert time.monotonic() - start < 25  # and not after half a minute, as by itself
    assert len(s3.gate.requests) > 2
    # It is known to be gone: nobody waits for it again, however patient. And not known is not the same as not there.
    monkeypatch.setattr(store, "PATIENCE", 60.0)
    start = time.monotonic()
    for call in (
        lambda: in_store(root).store.read(f"{root}/a"),
        root.exists,
        root.is_dir,
        lambda: list(root.iterdir()),
    ):
        with pytest.raises(OSError, match=r"tried for \d"):
            call()
    assert time.monotonic() - start < 40
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


def test_a_second_try_to_complete_an_upload_is_told_that_the_object_is_there(s3, small_parts):
    """As AWS does where the first try was done, and its answer lost. If another upload has made the object, that counts."""
    answers = iter(["lose", "taken", "taken"])
    s3.gate.rule = lambda request: next(answers) if request.startswith("POST") and "uploadId" in request else "pass"
    root = in_store(storage_path(s3.url, {"s3_additional_kwargs": {"Metadata": {"project": "p"}}}))
    root.store.write(str(root / "large"), [LARGE], create=True)
    with pytest.raises(FileExistsError):
        root.store.write(str(root / "large"), [LARGE], create=True)
    assert (root / "large").read_bytes() == LARGE
    assert s3.pending() == []
    assert s3.client.head_object(Bucket=s3.name, Key="runs/large")["Metadata"]["project"] == "p"


def test_an_upload_that_nobody_knows_of_does_not_stay(s3, small_parts):
    """It was begun, and the answer with its name was lost. Those of other objects do stay."""
    s3.client.create_multipart_upload(Bucket=s3.name, Key="runs/large-too")
    lost = iter(["lose"])
    s3.gate.rule = lambda request: next(lost, "pass") if request.endswith("?uploads") else "pass"
    root = storage_path(s3.url)
    disk_of(root).write(root / "large", [LARGE])
    assert (root / "large").read_bytes() == LARGE
    assert s3.pending() == ["runs/large-too"]


class Earlier(S3FileSystem):
    """s3fs before 2026.3."""

    async def _cat_file(self, path, version_id=None, start=None, end=None):
        return await super()._cat_file(path, version_id=version_id, start=start, end=end)

    async def _pipe_file(self, path, data, chunksize=50 << 20, **_):  # before 2024.12
        return await super()._pipe_file(path, data, chunksize=chunksize)


def test_an_s3fs_that_knows_less(s3, monkeypatch):
    monkeypatch.setitem(registry, "s3", Earlier)
    path = storage_path(s3.url) / "a"
    client = store.Store(in_store(path).store.root)
    client.create(str(path), b"abc")
    with pytest.raises(FileExistsError):
        client.create(str(path), b"other")
    assert client.read(str(path)) == b"abc"


def test_options_come_before_the_environment(s3):
    root = storage_path(s3.url, {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"})
    assert in_store(root / "a").store.options["endpoint_url"] == "http://127.0.0.1:9"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PATIENCE", 0.0)
        with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
            root.exists()
    assert s3.gate.requests == []


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
        [sys.executable, "-c", FIRST_USE, f"s3://{s3.name}"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert len(s3.objects()) == 8
