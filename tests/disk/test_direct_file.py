"""Large files past the page cache hold what they were given."""

from __future__ import annotations

import errno
import fcntl
import os
import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import names

from nemologger.disk import LocalDisk, direct_file
from nemologger.disk.direct_file import open_direct, write_direct


@pytest.fixture
def direct(tmp_path):
    """Whether the file system of the tests has O_DIRECT at all."""
    descriptor = open_direct(tmp_path / "probe")
    if descriptor is None:
        pytest.skip("this file system has no O_DIRECT")  # LocalDisk then writes as usual: see the last test
    os.close(descriptor)
    return tmp_path


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.sampled_from([0, 1, 511, 4096, 70_000, 8 << 20, (8 << 20) + 1, 20 << 20]), max_size=5))
def test_any_parts(direct, sizes):
    parts = [os.urandom(1) * size for size in sizes]
    path = direct / "file"
    descriptor = open_direct(path)
    write_direct(descriptor, map(memoryview, parts))
    os.close(descriptor)
    assert path.read_bytes() == b"".join(parts)


def test_a_failing_source_leaves_no_thread_and_no_file(tmp_path):
    def parts():
        yield bytes(6 << 20)
        raise KeyError("the tensor is gone")

    with pytest.raises(KeyError):
        LocalDisk().write(tmp_path / "x", parts())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_as_such(direct, monkeypatch):
    """Not as the buffers that cannot be given back while the error holds on to them."""

    def full(descriptor, data, position):
        if len(data) < 5 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return 4 << 20  # there was room for a part

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        LocalDisk().write(direct / "x", [bytes(40 << 20)])
    assert names(direct) == ["probe"]


def test_large_files_take_this_way_and_small_ones_do_not(direct, monkeypatch):
    used = []
    monkeypatch.setattr(direct_file, "write_direct", lambda fd, parts: used.append(fd) or write_direct(fd, parts))
    LocalDisk().write(direct / "small", [b"x" * 1000])
    assert used == []
    LocalDisk().write(direct / "large", [b"x" * 1000, b"y" * direct_file.WORTHWHILE])
    assert len(used) == 1
    assert (direct / "large").read_bytes() == b"x" * 1000 + b"y" * direct_file.WORTHWHILE


def test_without_it_files_are_written_as_usual(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "open_direct", lambda path: None)
    LocalDisk().write(tmp_path / "large", [b"y" * (direct_file.WORTHWHILE + 3)])
    assert (tmp_path / "large").stat().st_size == direct_file.WORTHWHILE + 3


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_system_that_takes_the_flag_and_refuses_what_is_written(direct, monkeypatch, whole):
    """As those of FUSE that hand the flag on, mergerfs and unionfs for two: no save succeeded there."""
    pwrite, refused = os.pwrite, []

    def refusing(descriptor, data, position):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(position)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", refusing)
    content = os.urandom(1) * (5 << 20)
    if whole:
        LocalDisk().write_image(direct / "x", memoryview(content), len(content) - 3)
    else:
        LocalDisk().write(direct / "x", [content[:-3]])
    assert (direct / "x").read_bytes() == content[:-3]
    assert refused == [0]
    assert names(direct) == ["probe", "x"]


@pytest.mark.parametrize("size", [16_489, (6 << 20) - 3])
@pytest.mark.parametrize("whole", [True, False])
def test_a_file_system_that_does_not_cut_files(tmp_path, monkeypatch, whole, size):
    """s3fs says that it has: whole pages were left, longer than the manifest says, and nothing could be resumed."""
    monkeypatch.setattr(os, "ftruncate", lambda descriptor, length: None)
    content = os.urandom(1) * size
    if whole:
        LocalDisk().write_image(tmp_path / "x", memoryview(content + bytes(-size % 4096)), size)
    else:
        LocalDisk().write(tmp_path / "x", [content])
    assert (tmp_path / "x").read_bytes() == content
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("size", [1 << 20, 6 << 20])
@pytest.mark.parametrize("whole", [True, False])
def test_a_file_system_that_does_not_keep_all_fails_the_write(tmp_path, monkeypatch, whole, size):
    """And says so to nobody."""
    fsync = os.fsync

    def loses(descriptor):
        os.truncate(f"/proc/self/fd/{descriptor}", size - 1)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", loses)
    content = bytes(size)
    with pytest.raises(OSError, match=rf"{size} bytes were written, {size - 1} are there: '.*/\.x\.partial'"):
        LocalDisk().write_image(tmp_path / "x", memoryview(content), size) if whole else LocalDisk().write(
            tmp_path / "x", [content]
        )
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [1 << 20, 6 << 20])
@pytest.mark.parametrize("whole", [True, False])
def test_a_limit_to_the_size_of_files_is_told_as_such_and_for_which_file(tmp_path, whole, size):
    """Past the page cache the kernel says that the argument is invalid: of the last page only a part is allowed."""
    content = memoryview(bytes(size))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/\.x\.partial'"):
            LocalDisk().write_image(tmp_path / "x", content, size) if whole else LocalDisk().write(
                tmp_path / "x", [content]
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []
