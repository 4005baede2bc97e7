"""A resume needs little more memory than the state itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import resume_memory
from processes import python


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are Linux's")
def test_there_is_no_second_copy_of_the_model(tmp_path):
    resume_memory.fit(tmp_path, resume_memory.Wide())
    done = python(Path(resume_memory.__file__), tmp_path / "x")
    assert float(done.stdout.splitlines()[-1]) < 1.25
