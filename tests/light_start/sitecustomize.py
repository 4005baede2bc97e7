"""Python runs this first in processes that have its directory in their path: scipy and matplotlib are not there for them.

Lightning imports torchmetrics, and that imports both where it finds them: a second of the processor's time for each of the
several hundred processes that the tests start, none of which uses them.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

_HIDDEN = ("scipy", "matplotlib")
_distribution = importlib.metadata.distribution


def _without_hidden(name: str) -> importlib.metadata.Distribution:
    if name in _HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return _distribution(name)


importlib.metadata.distribution = _without_hidden
sys.modules.update(dict.fromkeys(_HIDDEN))  # None: an import of it fails
if "SIMULATED_CUDA" in os.environ:
    import simulated_cuda.patches  # noqa: F401
