"""A directory in a store, and stores that are easily impatient."""

from __future__ import annotations

import pytest

from nemologger.stores import store
from nemologger.stores.path import storage_path
from nemologger.stores.remote_disk import disk_of


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
