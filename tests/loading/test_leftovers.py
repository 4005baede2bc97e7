"""What a killed run has left half done."""

from __future__ import annotations

from toy import names

from nemologger.checkpoint.commit import begin
from nemologger.disk import LocalDisk
from nemologger.loading.leftovers import finish


def test_what_was_begun_is_removed_and_said(tmp_path, caplog):
    begin(LocalDisk(), tmp_path / "step=2")
    (tmp_path / "mine.txt").write_text("kept")
    finish(tmp_path)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["mine.txt"]
    assert f"cleaning up after an earlier run in {tmp_path}" in caplog.text


def test_where_nothing_is_nothing_is_made(tmp_path):
    finish(tmp_path / "gone")
    assert names(tmp_path) == []
