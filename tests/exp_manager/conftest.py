"""For tests of exp_manager."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_version(monkeypatch):
    """A version that the machine's environment gives is no part of a section."""
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)
