"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import logging
import pkgutil

import pytest

import nemologger
from nemologger.run.log_files import _Tap

MODULES = sorted(module.name for module in pkgutil.walk_packages(nemologger.__path__, "nemologger."))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, _Tap):  # of a run that an example set up, but did not train
            handler.detach()


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(examples) > 30
