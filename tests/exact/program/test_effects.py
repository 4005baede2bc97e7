"""The source of functions, of which effects are read."""

from __future__ import annotations

import importlib.util
import linecache
import warnings

from nemologger.exact.program.effects import source_of


def _function(path, text):
    path.write_text(text)
    linecache.checkcache()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(action="ignore"):
        spec.loader.exec_module(module)
    return module.count


def test_a_file_that_has_been_changed_since_it_was_read_has_none(tmp_path):
    path = tmp_path / "changed.py"
    function = _function(path, "\n\ndef count():\n    return 1\n")
    assert source_of(function).name == "count"
    function = _function(path, "\n\n\ndef count():\n    return 1\n")
    path.write_text('"""A text.\n\n\n@a "quoted" line\n"""\n')
    assert source_of(function) is None


def test_what_python_has_warned_of_is_not_said_once_more(tmp_path):
    function = _function(tmp_path / "old.py", 'def count():\n    return "\\d"\n')
    with warnings.catch_warnings(action="error"):
        assert source_of(function).name == "count"
