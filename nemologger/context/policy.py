"""What a context may refer to: the allow-list that stands between somebody's file and this process.

A reference in ``io.json`` names a module and a symbol. It is admitted by what it turns out to be, not by the name it was
given: ``mypackage.os.popen``, or ``mypackage.popen`` if that module imported it, is still ``os.popen``.

- Modules are imported only from nemologger, from the parts of torch and Lightning listed here, and from packages the caller
  names. Everything else has to be imported by the user's program already.
- Of the user's own modules (neither Python's nor installed by a package manager), every class and function is admitted.
- Of Python itself, a short list of value types.
- Of torch and Lightning, the classes people configure (layers, optimizers, samplers, callbacks, loggers, strategies) and
  mathematical functions. Not ``torch.load``, ``torch.hub``, ``LightningCLI``, or anything that takes a path or a command.
- Of nemologger, its classes, and the functions of :mod:`nemologger.context.rebuild`.
- Of other installed packages, what was given to ``track_io`` or inherits ``IOMixin``, optimizers, schedulers, and
  dataclasses and named tuples without code of their own. Their constructors at large may do anything: some download, run
  commands, or unpickle.
- Members of enumerations, from anywhere: they are constants.

What is admitted is called with the arguments that the file gives. A function of the user's own that deletes what it is told
to delete does so for the file too.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import importlib
import pathlib
import sys
import sysconfig
import types
import uuid
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins import CheckpointIO, Precision
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.strategies.strategy import Strategy
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy as TrainerStrategy

from nemologger.condition import holds
from nemologger.context import rebuild
from nemologger.context.capture import is_tracked
from nemologger.context.references import TORCH_CONSTANTS, Detour, Reference, find
from nemologger.errors import ConfigurationError, ContextError, RefusedError

Trust = bool | Sequence[str]

_STANDARD = (
    *(list, dict, tuple, set, frozenset, int, float, str, bool, bytes, bytearray, complex, slice, range, type(None)),
    *(collections.OrderedDict, collections.defaultdict, collections.deque, collections.Counter, functools.partial),
    *(datetime.timedelta, datetime.datetime, datetime.date, datetime.time, datetime.timezone),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID, argparse.Namespace, types.SimpleNamespace),
    *(pathlib.Path, pathlib.PosixPath, pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath),
)
_TORCH = (torch.Size, torch.device, torch.dtype, torch.Tensor)
_TORCH_CLASSES = (
    *("torch.nn.modules", "torch.optim", "torch.distributions", "torch.amp.grad_scaler", "torch.nn.attention"),
    *("torch.utils.data.dataloader", "torch.utils.data.dataset", "torch.utils.data.sampler"),
    *("torch.utils.data.distributed", "torch.distributed.fsdp"),
)
_TORCH_FUNCTIONS = (
    *("torch.nn.functional", "torch.nn.init", "torch.distributed.fsdp.wrap"),
    "torch.distributed.algorithms.ddp_comm_hooks",
)
# Of torch's functions written in C those that compute; from_file, for one, creates files.
_TORCH_BUILTINS = frozenset({
    "abs", "acos", "asin", "atan", "ceil", "clamp", "cos", "cosh", "erf", "exp", "expm1", "floor", "gelu", "leaky_relu",
    "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "max", "mean", "min", "mul", "neg", "norm", "ones", "pow",
    "prod", "relu", "relu_", "round", "rsqrt", "selu", "sigmoid", "sign", "sin", "sinh", "softmax", "sqrt", "square", "std",
    "sub", "sum", "tan", "tanh", "var", "where", "zeros",
})  # fmt: skip
_LIGHTNING = (
    # Not the loggers that open a session with a server when they are made.
    *("lightning.pytorch.loggers.tensorboard", "lightning.pytorch.loggers.csv_logs", "lightning.pytorch.loggers.wandb"),
    *("lightning.pytorch.callbacks", "lightning.pytorch.strategies"),
    *("lightning.pytorch.plugins", "lightning.pytorch.profilers", "lightning.pytorch.accelerators"),
    *("lightning.pytorch.trainer.trainer", "lightning.pytorch.core", "lightning.pytorch.demos.boring_classes"),
    *("lightning.fabric.plugins", "lightning.fabric.strategies", "lightning.fabric.accelerators"),
    *("lightning.fabric.loggers.tensorboard", "lightning.fabric.loggers.csv_logs", "lightning.fabric.utilities.data"),
)
_LIGHTNING_KINDS = (
    *(pl.Trainer, pl.LightningModule, pl.LightningDataModule, pl.Callback, Profiler, Logger, Strategy, TrainerStrategy),
    *(Accelerator, Precision, CheckpointIO, ClusterEnvironment, LayerSync, dict),
)
# Debuggers live outside site-packages and are in sys.modules of a program they watch.
_TOOLS = ("debugpy", "pydevd", "_pydev", "pydev_")

# NeMo's name -> ours, for the classes that exist here too.
NEMO_NAMES = {
    Reference("nemo.lightning.io.pl", "TrainerContext"): Reference("nemologger.io", "TrainerContext"),
    Reference("nemo.lightning.io.artifact.file", "FileArtifact"): Reference("nemologger.io", "FileArtifact"),
    Reference("nemo.lightning.io.artifact.file", "DirArtifact"): Reference("nemologger.io", "DirArtifact"),
    Reference("nemo.lightning.pytorch.trainer", "Trainer"): Reference("nemologger.trainer", "Trainer"),
    Reference("nemo.lightning.pytorch.callbacks.model_checkpoint", "ModelCheckpoint"): Reference(
        "nemologger.model_checkpoint", "ModelCheckpoint"
    ),
    Reference("nemo.lightning.nemo_logger", "NeMoLogger"): Reference("nemologger.logger", "NeMoLogger"),
    Reference("nemo.lightning.resume", "AutoResume"): Reference("nemologger.resume", "AutoResume"),
    Reference("nemo.lightning.resume", "RestoreConfig"): Reference("nemologger.resume", "RestoreConfig"),
    Reference("nemo.lightning.pytorch.strategies.utils", "RestoreConfig"): Reference(
        "nemologger.resume", "RestoreConfig"
    ),
}


class Policy:
    """Decides over every reference of one context.

    Args:
        trust: False for the allow-list alone; a list of package names that are admitted too, with everything they define,
            and imported if need be; True for everything, which is to run the file.

    Raises:
        ConfigurationError: If ``trust`` is something else.

    Example:
        >>> Policy().resolve("torch.optim", "SGD", "model.optim").__name__
        'SGD'
        >>> try:
        ...     Policy().resolve("subprocess", "run", "model.optim")
        ... except RefusedError as error:
        ...     print(str(error).partition(" If ")[0])
        model.optim is subprocess.run: a function of Python itself is not admitted.
    """

    def __init__(self, trust: Trust = False) -> None:
        if isinstance(trust, str):
            trust = [trust]
        if not isinstance(trust, bool) and not holds(
            lambda: all(isinstance(name, str) and name and not name.endswith(".") for name in trust)
        ):
            raise ConfigurationError(
                f"trust must be True, False or a list of package names such as 'timm', not {trust!r}"
            )
        self.everything = trust is True
        self._named = () if isinstance(trust, bool) else tuple(trust)

    def resolve(self, module: str, symbol: str, where: str) -> Any:
        """The class, function or constant at ``module`` and ``symbol``.

        Args:
            module: As the file has it; NeMo's modules are mapped to ours.
            symbol: As the file has it.
            where: The path inside the context, for the message.

        Raises:
            RefusedError: If it is not admitted.
            ContextError: If it is admitted but is not there.
        """
        written = Reference(module, symbol)
        wanted = NEMO_NAMES.get(written, written).public()
        if self.everything:
            return _import(wanted, where)
        if _within(wanted.module, self._named):
            value = _import(wanted, where)
        else:
            if wanted.module not in sys.modules:
                self._import_if_admitted(wanted, where)
            try:
                value = find(wanted.module, wanted.symbol)
            except Detour:
                raise RefusedError(
                    f"{where} is {written}: a path through modules or into the inside of an object is not admitted. Only "
                    "trust=True reads such a file."
                ) from None
            except LookupError as error:
                hint = ""
                if wanted.module == "__main__":
                    hint = (
                        " It was defined in the script or notebook that wrote the context: define it here too (run its "
                        "cell), or move it to a module both can import."
                    )
                raise ContextError(f"{where} is {written}, which does not exist here: {error}.{hint}") from None
        refusal = self._refusal(value, wanted)
        if refusal is not None:
            raise RefusedError(f"{where} is {written}: {refusal} is not admitted. {_advice(wanted, value)}")
        return value

    def _import_if_admitted(self, wanted: Reference, where: str) -> None:
        if _within(wanted.module, ("nemologger", *_TORCH_CLASSES, *_TORCH_FUNCTIONS, *_LIGHTNING)):
            _import(wanted, where)
        elif _within(wanted.module, ("nemo",)):
            raise ContextError(
                f"{where} is {wanted}, a class of NeMo that has no counterpart here. With NeMo installed, pass "
                "trust=['nemo']; load_context(..., build=False) shows the configuration without the class."
            )
        elif _within(wanted.module, ("torch", "lightning")):
            raise RefusedError(
                f"{where} is {wanted}, which is not in the parts of torch and Lightning that are admitted. "
                f"{_advice(wanted, None)}"
            )
        else:
            raise RefusedError(
                f"{where} is {wanted}, and this program has not imported {wanted.module}. Import it before loading the "
                f"context, or pass trust=[{wanted.module.partition('.')[0]!r}] if it may be imported."
            )

    def _refusal(self, value: Any, found: Reference) -> str | None:
        """What ``value`` is, if it is not admitted."""
        if isinstance(value, TORCH_CONSTANTS) or (isinstance(value, enum.Enum) and not callable(value)):
            return None
        if any(value is known for known in (*_STANDARD, *_TORCH, *rebuild.FUNCTIONS)):
            return None
        if isinstance(value, types.BuiltinFunctionType) and not _within(str(value.__module__), self._named):
            return None if self._is_torch_builtin(value, found) else "a function written in C"
        if isinstance(value, types.MethodType):
            owner = value.__self__
            if not isinstance(owner, type):
                return "a method of an object"
            # A method that the user's class inherits, such as load_from_checkpoint, is where it was written.
            return self._refusal(owner, found) or self._refusal(value.__func__, found)
        if not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return f"an object of type {type(value).__qualname__}"
        home = str(value.__module__)
        if _within(home, self._named):
            return None
        kind = "a class" if isinstance(value, type) else "a function"
        return self._refusal_at(home, value, kind)

    def _refusal_at(self, home: str, value: Any, kind: str) -> str | None:
        is_class = isinstance(value, type)
        if _within(home, ("nemologger",)):
            ours = is_class and (
                is_tracked(value) or dataclasses.is_dataclass(value) or issubclass(value, _LIGHTNING_KINDS)
            )
            return None if ours else f"{kind} of nemologger"
        if _within(home, ("torch",)):
            return None if _within(home, _TORCH_CLASSES if is_class else _TORCH_FUNCTIONS) else f"{kind} of {home}"
        if _within(home, ("lightning",)):
            admitted = is_class and _within(home, _LIGHTNING) and issubclass(value, _LIGHTNING_KINDS)
            return None if admitted else f"{kind} of {home}"
        origin = origin_of(home)
        if origin == "own":
            return None
        if origin == "standard":
            return f"{kind} of Python itself"
        return None if is_class and _is_harmless(value) else f"{kind} of the installed package {home.partition('.')[0]}"

    def _is_torch_builtin(self, value: Any, found: Reference) -> bool:
        if found.module == "torch.nn.functional":
            return str(value.__module__).startswith("torch")
        return found.module == "torch" and found.symbol in _TORCH_BUILTINS


def origin_of(module: str) -> str:
    """Whose code ``module`` is: "own" for the user's, "standard" for Python's, "installed" for a package's."""
    found = sys.modules.get(module)
    if found is None or module.startswith(_TOOLS):
        return "installed"
    file = _file(found) or _file(sys.modules.get(module.partition(".")[0]))
    if file is None:
        if module in ("__main__", "__mp_main__"):
            return "own"  # an interactive session
        return "standard" if module.partition(".")[0] in sys.stdlib_module_names else "installed"
    path = pathlib.Path(file).resolve()
    if not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return "installed"
    depth = module.count(".") + (path.name == "__init__.py")
    if any(path.parents[min(depth, len(path.parents) - 1)].glob("*.dist-info")):
        return "installed"  # by pip install --target, or into a place that only a vendor knows
    library = (pathlib.Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
    return "standard" if any(path.is_relative_to(directory) for directory in library) else "own"


def _file(module: types.ModuleType | None) -> str | None:
    file = getattr(module, "__file__", None)
    if file is None:
        file = next(iter(getattr(module, "__path__", ())), None)
    return file if isinstance(file, str) else None


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _is_harmless(cls: type) -> bool:
    """Whether an installed package's class was meant to be in a context, or has no code that making one would run."""
    if is_tracked(cls) or issubclass(cls, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
        return True
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _is_generated(cls.__new__) and cls.__init__ is object.__init__
    return (
        dataclasses.is_dataclass(cls)
        and type(cls) is type
        and _is_generated(cls.__init__)
        and cls.__new__ is object.__new__
        and not hasattr(cls, "__post_init__")
        and not any("__call__" in vars(base) for base in cls.__mro__)  # whoever is given the instance may call it
        and cls.__setattr__ is object.__setattr__
    )


def _is_generated(function: Any) -> bool:
    """Whether Python's library wrote this constructor, which then only assigns."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith("<string>")


def _import(wanted: Reference, where: str) -> Any:
    try:
        value: Any = importlib.import_module(wanted.module)
        for part in wanted.symbol.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ContextError(f"{where} is {wanted}, which does not exist here: {error}.") from error
    return value


def _advice(wanted: Reference, value: Any) -> str:
    home = str(getattr(value, "__module__", None) or wanted.module)
    package = home if origin_of(home) == "standard" or _within(home, ("torch", "lightning")) else home.partition(".")[0]
    return (
        f"If you know who wrote this file, pass trust=[{package!r}], which admits all that {package} defines, or "
        "trust=True; load_context(..., build=False) shows the configuration and runs nothing."
    )
