"""What ``nemologger.callbacks`` offers: each usable alone, and imported when it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from lightning.pytorch.callbacks import Callback

from nemologger import callbacks


@pytest.mark.parametrize("name", callbacks.__all__)
def test_each_is_a_documented_callback_with_an_example(name):
    kind = getattr(callbacks, name)
    assert issubclass(kind, Callback)
    assert "Example:" in inspect.getdoc(kind)
    assert name in dir(callbacks)


def test_there_is_no_other():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = callbacks.Nothing


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, nemologger.callbacks; print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
