"""Read a context, and make its objects again, without running anything that the reader's program does not know."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any

import fiddle as fdl

from nemologger.context import configs
from nemologger.context.artifacts import restore
from nemologger.context.configs import step
from nemologger.context.policy import Policy, Trust
from nemologger.context.serialized import Reader
from nemologger.context.trainer_context import TrainerContext
from nemologger.context.uncaptured import Uncaptured
from nemologger.disk.there import exists, is_dir, is_file
from nemologger.errors import ContextError, NotFoundError
from nemologger.names import CHECKPOINTS, CONTEXT, IO_JSON, WEIGHTS
from nemologger.stores.path import storage_path


def load_context(path: str | Path, subpath: str | None = None, build: bool = True, trust: Trust = False) -> Any:
    """Read a context and make its objects again.

    Nothing is unpickled, and only what the allow-list of :mod:`nemologger.context.policy` admits is looked up or called:
    the user's own modules as far as they are imported, nemologger, and the classes of torch and Lightning that people
    configure.

    Args:
        path: A context directory, or a checkpoint that has one.
        subpath: The part to load, such as ``"model"``, ``"model.config"`` or ``"extra.datamodule"``. What is outside of it
            is not even looked up.
        build: Make the objects. False: return the ``fdl.Config``; a class that is missing or refused is then a placeholder
            that raises when it is built, and a warning names it.
        trust: Packages that are admitted and imported too, for instance ``["timm"]``, with every class and function they
            define. True: everything, pickles included. That runs the code of whoever wrote the file.

    Returns:
        The :class:`TrainerContext`, or what is at ``subpath``. Arguments that the context could not keep are left out, with
        a warning that names them.

    Raises:
        NotFoundError: If there is no context.
        ContextError: If it is damaged, has nothing at ``subpath``, names a class that is not here, or could not keep an
            argument that is needed.
        RefusedError: If it refers to something that is not admitted. The message names the entry and how to admit it.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> TrainerContext(model=None, trainer=None, extra={"width": 3}).io_dump(directory, yaml_attrs=())
        >>> load_context(directory, "extra.width")
        3
    """
    directory = _find(storage_path(path))
    reader = Reader(directory / IO_JSON, Policy(trust), lenient=not build)
    value = reader.value(subpath or "")
    restore(value, directory)
    if not build:
        if reader.placeholders:
            said = "\n".join(f"  - {message}" for message in reader.placeholders)
            warnings.warn(
                f"{directory}: some entries are placeholders, which raise when they are built:\n{said}", stacklevel=2
            )
        return value
    value = _without_uncaptured(value, subpath or "", directory)
    return fdl.build(value) if _has_buildable(value) else value


def _find(path: Path) -> Path:
    candidates = [path, path / CONTEXT, *([path.parent / CONTEXT] if path.name == WEIGHTS else [])]
    for candidate in candidates:
        if is_file(candidate / IO_JSON):
            return candidate
    checkpoints = path / CHECKPOINTS if is_dir(path / CHECKPOINTS) else path
    inside = sorted(found.parent.parent.name for found in checkpoints.glob(f"*/{CONTEXT}/{IO_JSON}"))
    hint = f" The checkpoints in {checkpoints} have one: {', '.join(inside)}." if inside else ""
    if not exists(path):
        raise NotFoundError(f"{path.absolute()} does not exist: expected a checkpoint, or its {CONTEXT}/.")
    what = "is a directory without" if is_dir(path) else "is a file, which has no"
    raise NotFoundError(f"{path.absolute()} {what} {IO_JSON} or {CONTEXT}/{IO_JSON}.{hint}")


def _without_uncaptured(value: Any, where: str, directory: Path) -> Any:
    """``value`` with what the context could not keep left to defaults; in a dictionary, its record stays to be seen."""
    if _is_uncaptured(value):
        raise ContextError(f"{directory}: {where} was not kept: {_reason(value)}.")
    leaving = _Leaving(directory)
    kept = leaving.visit(value, where)
    if leaving.left_out:
        said = "\n".join(f"  - {message}" for message in leaving.left_out)
        warnings.warn(f"{directory} could not keep these arguments, which are left out:\n{said}", stacklevel=3)
    return kept


class _Leaving:
    """Goes through a config, without what the context could not keep.

    Args:
        directory: Where the context is, to be named.

    Attributes:
        left_out: What it was, and why.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._done: dict[int, Any] = {}
        self.left_out: list[str] = []

    def visit(self, node: Any, path: str) -> Any:
        """``node`` without that; each once."""
        if id(node) not in self._done:
            self._done[id(node)] = self._without(node, path)
        return self._done[id(node)]

    def _without(self, node: Any, path: str) -> Any:
        if isinstance(node, fdl.Buildable):
            kept = {
                name: self.visit(argument, step(path, name))
                for name, argument in configs.arguments(node).items()
                if not _is_uncaptured(argument) or self._may_stay(node, name, step(path, name), argument)
            }
            self._check_arguments(node, kept, path)
            return configs.make(type(node), node.__fn_or_cls__, kept)
        if type(node) is dict:
            return {key: self.visit(item, step(path, key)) for key, item in node.items()}
        if type(node) in (list, tuple):
            lost = [f"{step(path, i)}: {_reason(item)}" for i, item in enumerate(node) if _is_uncaptured(item)]
            self.left_out += lost
            return type(node)(
                self.visit(item, step(path, i)) for i, item in enumerate(node) if not _is_uncaptured(item)
            )
        return node

    def _check_arguments(self, node: Any, given: configs.Arguments, path: str) -> None:
        """Refuse arguments of a class that has others today."""
        called = node.__fn_or_cls__
        parameters = configs.signature(called).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        unknown = [name for name in given if isinstance(name, str) and name not in parameters]
        if unknown and Parameter.VAR_KEYWORD not in kinds:
            wrong = f"has no argument {unknown[0]!r} any more, but {', '.join(parameters) or 'none'}"
        elif lacking := [] if isinstance(node, fdl.Partial) else _lacking(parameters, given):
            wrong = f"needs an argument {lacking[0]!r}, which it did not have then"
        else:
            return
        raise ContextError(
            f"{self._directory}: {path or 'the whole'} is {called.__module__}.{called.__qualname__}, which {wrong}. Load it "
            "with nemologger.io.load_context(..., build=False), change the config, and build it with fdl.build."
        )

    def _may_stay(self, node: Any, name: str | int, path: str, argument: Any) -> bool:
        """Whether it is only seen, not used; if it is left out, the callable must have a default for it."""
        if node.__fn_or_cls__ is TrainerContext:
            return True
        parameter = configs.signature(node.__fn_or_cls__).parameters.get(str(name))
        if parameter is None or (parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD):
            raise ContextError(
                f"{self._directory}: {path} was not kept: {_reason(argument)}. Load with build=False, set the argument in "
                "the config, and build it with fdl.build."
            )
        self.left_out.append(f"{path}: {_reason(argument)}")
        return False


def _lacking(parameters: Mapping[str, Parameter], given: configs.Arguments) -> list[str]:
    """The arguments by name that must be given, and are not."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [
        name for name, one in parameters.items() if one.kind in named and one.default is one.empty and name not in given
    ]


def _is_uncaptured(value: Any) -> bool:
    return isinstance(value, fdl.Buildable) and value.__fn_or_cls__ is Uncaptured


def _reason(value: Any) -> str:
    arguments = configs.arguments(value)
    return f"{arguments.get('what')}: {arguments.get('reason')}"


def _has_buildable(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_buildable, value.values()))
    return isinstance(value, fdl.Buildable) or (isinstance(value, (list, tuple)) and any(map(_has_buildable, value)))
