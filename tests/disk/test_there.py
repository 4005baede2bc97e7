"""Whether something is at a path."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

import nemologger
from nemologger.disk.there import exists, is_dir, is_file, is_symlink
from nemologger.stores.path import storage_path

ALL = (exists, is_dir, is_file, is_symlink)


def test_what_is_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to("nowhere")
    seen = {path.name: [ask(path) for ask in ALL] for path in tmp_path.iterdir()}
    assert seen == {
        "file": [True, False, True, False],
        "link": [True, True, False, True],
        "broken": [False, False, False, True],
    }
    for absent in (tmp_path / "none", tmp_path / "file" / "below", Path("a\0b"), storage_path("memory://bucket/none")):
        assert [ask(absent) for ask in ALL] == [False] * 4


@pytest.mark.parametrize("ask", ALL)
def test_what_the_disk_does_not_tell_is_an_error(ask):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:  # pytest's own are closed to others
        (Path(place) / "closed").mkdir(mode=0)
        Path(place).chmod(0o755)
        try:
            with suppress(PermissionError):  # only root may, who reads everything
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                ask(Path(place) / "closed" / "file")
        finally:
            os.seteuid(user)


def test_nobody_asks_pathlib():
    package = Path(nemologger.__file__).parent
    others = {
        package / name for name in ("stores/path.py", "stores/remote_disk.py", "watch/guard_main.py", "disk/there.py")
    }
    asks = re.compile(r"(?<!\bentry)\.(exists|is_dir|is_file|is_symlink)\(")
    found = [str(file) for file in package.rglob("*.py") if file not in others and asks.search(file.read_text())]
    assert found == []
