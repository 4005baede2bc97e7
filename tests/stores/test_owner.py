"""The run that has begun last has a directory in a store."""

from __future__ import annotations

import pytest

from nemologger.stores import owner
from nemologger.stores.owner import FILE, StoreOwner, taken_over_by
from nemologger.stores.path import storage_path
from nemologger.stores.remote_disk import disk_of


@pytest.fixture
def directory():
    path = storage_path("memory://owned/runs")
    yield path
    disk_of(path).remove(path)


def test_several_in_one_process_have_it_until_the_last_gives_it_back(directory):
    first, second = StoreOwner(directory), StoreOwner(directory)
    first.take()
    second.take()
    first.release()
    first.release()
    assert (directory / FILE).exists()
    assert taken_over_by(directory) == ""
    second.release()
    assert not (directory / FILE).exists()


def test_the_newest_has_it_and_leaves_word_if_the_older_one_has_not_given_it_back(directory, monkeypatch):
    older, newer = StoreOwner(directory), StoreOwner(directory)
    older.take()
    with monkeypatch.context() as patch:
        patch.setattr(owner, "_OWNED", {})  # another process
        newer.take()
        assert taken_over_by(directory) == ""
        newer.release()
    assert taken_over_by(directory).startswith("process ")
    older.release()
    assert (directory / FILE).exists(), "it is the newer one's"
    assert taken_over_by(directory) == "", "this process has it no more"


def test_what_somebody_has_removed_is_nobodys(directory):
    mine = StoreOwner(directory)
    mine.take()
    disk_of(directory).store.remove_object(f"{directory}/{FILE}")
    assert taken_over_by(directory) == ""
    mine.release()
