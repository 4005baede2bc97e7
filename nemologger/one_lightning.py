"""One Lightning for a program whose libraries import the other one.

Lightning is there as two packages, ``lightning.pytorch`` and ``pytorch_lightning``, with the same code: a module made with
the one is none for a trainer of the other. Libraries that import the second (darts, neuralforecast, lightly) go with this
one when both names stand for the first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from nemologger.errors import ConfigurationError

_NAMES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


def use_one_lightning() -> None:
    """Let ``import pytorch_lightning`` give ``lightning.pytorch`` from now on, in this process.

    Call it in the first lines of a script, before any library that imports ``pytorch_lightning``. Which of the two is
    installed beside ``lightning`` does not matter. A second call changes nothing.

    Raises:
        ConfigurationError: If somebody has imported the other package already.

    Example::

        import nemologger

        nemologger.use_one_lightning()
        from darts.models import NBEATSModel
    """
    if any(isinstance(finder, _OtherNames) for finder in sys.meta_path):
        return
    if there := [name for name in _NAMES if name in sys.modules]:  # the one that people know comes first
        raise ConfigurationError(
            f"{there[0]} has been imported already, and what was made with it stays apart from lightning.pytorch: call "
            "nemologger.use_one_lightning() in the first lines of the script, before the library that imports it"
        )
    sys.meta_path.insert(0, _OtherNames())


class _OtherNames(MetaPathFinder, Loader):
    """Finds the modules of the one package under the names of the other."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.partition(".")[0] in _NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        package, dot, rest = spec.name.partition(".")
        module = import_module(f"{_NAMES[package]}{dot}{rest}")
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run. Python has just given it another specification, which relative imports in it go by."""
        spec = module.__spec__
        if spec is not None and spec.name in self._specs:
            module.__spec__ = self._specs.pop(spec.name)
