"""Where a disk is mounted, and whether it still is."""

from __future__ import annotations

from pathlib import Path

from nemologger.disk.mounts import has_lost, mount_of

LINES = """22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
30 22 0:44 / {here}/my\\040disk rw - nfs server:/x rw
31 30 8:1 /y {here}/my\\040disk/bound rw - ext4 /dev/sda1 rw
32 22 0:45 / {here}/my rw - tmpfs none rw
"""


def test_the_innermost_mount_counts(tmp_path):
    mountinfo = tmp_path / "proc" / "self" / "mountinfo"
    mountinfo.parent.mkdir(parents=True)
    mountinfo.write_text(LINES.format(here=str(tmp_path).replace(" ", "\\040")))
    disk = tmp_path / "my disk"
    (tmp_path / "link").symlink_to(disk)
    assert mount_of(disk / "run", tmp_path) == mount_of(tmp_path / "link" / "run", tmp_path) == disk
    assert mount_of(disk / "bound", tmp_path) == disk / "bound"
    assert mount_of(tmp_path / "mine", tmp_path) == Path("/")
    assert mount_of(disk, tmp_path / "elsewhere") is None


def test_what_lies_elsewhere_now_has_lost_nothing(tmp_path):
    """As a link that leads to another disk since."""
    assert has_lost(tmp_path / "old" / "run", tmp_path / "old")
    (tmp_path / "old").symlink_to("new")
    assert not has_lost(tmp_path / "old" / "run", tmp_path / "old")
    assert not has_lost(tmp_path, mount_of(tmp_path))


def test_where_nobody_says_what_is_mounted_nothing_is_lost(tmp_path):
    assert has_lost(tmp_path, tmp_path)
    assert not has_lost(tmp_path, tmp_path, root=tmp_path / "without proc")
