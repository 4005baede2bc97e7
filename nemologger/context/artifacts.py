"""Files that belong to an object: a vocabulary, a merges table. They are kept inside the context."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fiddle as fdl

from nemologger.context import configs
from nemologger.context.capture import is_tracked
from nemologger.context.configs import step
from nemologger.disk import Disk
from nemologger.disk.there import exists, is_dir, is_file
from nemologger.errors import ContextError, RefusedError

_BLOCK = 16 << 20


@dataclass(frozen=True)
class FileArtifact:
    """Says that a constructor argument is the path of a file to keep with the context.

    Attributes:
        attr: The name of the argument.
        required: Whether a context without the file is an error. False: the argument is kept as it was.
        skip: In a context: the file was not there, ``attr`` is the argument's own value.

    Example:
        >>> from nemologger.io import IOMixin
        >>> class Tokenizer(IOMixin):
        ...     __io_artifacts__ = [FileArtifact("vocab_file")]
        ...     def __init__(self, vocab_file): ...
    """

    attr: str
    required: bool = True
    skip: bool = False


@dataclass(frozen=True)
class DirArtifact(FileArtifact):
    """As :class:`FileArtifact`, for a directory with all it holds."""


def artifacts_of(target: Any) -> list[FileArtifact]:
    """The artifacts that a class declares, by ``io_artifacts()`` or ``__io_artifacts__``."""
    if not isinstance(target, type) or not is_tracked(target):
        return []
    declared = getattr(target, "io_artifacts", None)
    listed = getattr(target, "__io_artifacts__", ()) if declared is None else declared()
    return [artifact for artifact in listed if isinstance(artifact, FileArtifact)]


@dataclass
class Copies:
    """Which files go into a context, and under which names.

    Attributes:
        taken: Names, in lower case, that are not free.
        strict: Whether a required file that is not there is an error.
        sources: Name inside the context -> the file or directory to copy.
        missing: What was not there, as messages.
    """

    taken: set[str]
    strict: bool = True
    sources: dict[str, Path] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def plan(self, config: Any) -> None:
        """Give every artifact below ``config`` its name, and set the argument to that name.

        Args:
            config: A config that belongs to the caller; it is changed.

        Raises:
            ContextError: If a required file is not there and ``strict`` is set.
        """
        for node, path in _buildables(config, ""):
            for artifact in artifacts_of(node.__fn_or_cls__):
                self._plan_one(node, artifact, step(path, artifact.attr))

    def _plan_one(self, node: Any, artifact: FileArtifact, path: str) -> None:
        value = _argument(node, artifact.attr)
        text = _path_text(value)
        if not text:
            return
        source = Path(text)
        is_there = is_dir(source) if isinstance(artifact, DirArtifact) else is_file(source)
        if is_there:
            name = self._name(source)
            kept = configs.config(pathlib.Path, name) if isinstance(value, fdl.Buildable) else name
        else:
            what = "directory" if isinstance(artifact, DirArtifact) else "file"
            message = f"{path}: there is no {what} {text!r}"
            if artifact.required and self.strict:
                raise ContextError(
                    f"{message}, which {type(artifact).__name__}({artifact.attr!r}) of {node.__fn_or_cls__.__qualname__} "
                    "keeps with the context. Restore it, or declare the artifact with required=False."
                )
            self.missing.append(message)
            kept = configs.make(fdl.Config, type(artifact), {"attr": text, "skip": True})
        setattr(node, artifact.attr, kept)

    def _name(self, source: Path) -> str:
        """The file's own name, with a number where another file has it already."""
        number = 1
        name = source.resolve().name
        while True:
            known = self.sources.get(name)
            if known is not None and known.resolve() == source.resolve():
                return name
            # Without regard to case: some file systems have none.
            if name.lower() not in self.taken:
                self.taken.add(name.lower())
                self.sources[name] = source
                return name
            number += 1
            name = f"{source.stem}-{number}{source.suffix}"

    def write(self, directory: Path, disk: Disk) -> None:
        """Copy the files into ``directory``."""
        for name, source in self.sources.items():
            target = directory / name
            if exists(target) and target.samefile(source):
                continue  # the object was loaded from this very context
            if is_dir(source):
                disk.remove(target)
                _copy_tree(source, target, disk)
            else:
                disk.write(target, _blocks(source))


def restore(config: Any, directory: Path) -> None:
    """Turn the names of artifacts below ``config`` into absolute paths inside ``directory``.

    Raises:
        RefusedError: If a name leads out of the directory.
    """
    for node, path in _buildables(config, ""):
        for artifact in artifacts_of(node.__fn_or_cls__):
            value = configs.arguments(node).get(artifact.attr)
            where = step(path, artifact.attr)
            if isinstance(value, fdl.Buildable) and value.__fn_or_cls__ in (FileArtifact, DirArtifact):
                setattr(node, artifact.attr, configs.arguments(value).get("attr"))
            elif isinstance(value, fdl.Buildable) and _path_text(value):
                setattr(node, artifact.attr, configs.config(pathlib.Path, _inside(directory, _path_text(value), where)))
            elif isinstance(value, str) and value:
                setattr(node, artifact.attr, _inside(directory, value, where))


def _inside(directory: Path, name: str, where: str) -> str:
    root = directory.resolve()
    path = (root / name).resolve()
    inside = path != root and path.is_relative_to(root) and ".." not in Path(name).parts
    if Path(name).is_absolute() or not inside:
        raise RefusedError(
            f"{where} names the file {name!r} as one that came with the context {directory}, but it lies outside of it. "
            "The file was not written by this library, or was changed since."
        )
    return str(path)


def _argument(node: Any, name: str) -> Any:
    arguments = configs.arguments(node)
    if name in arguments:
        return arguments[name]
    parameter = configs.signature(node.__fn_or_cls__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _path_text(value: Any) -> str:
    """The path that an argument holds, as a string or as a config of a ``pathlib.Path``; empty for anything else."""
    if isinstance(value, fdl.Buildable) and value.__fn_or_cls__ in (pathlib.Path, pathlib.PosixPath):
        return str(configs.arguments(value).get(0, ""))
    return str(value) if isinstance(value, (str, pathlib.Path)) else ""


def _buildables(value: Any, path: str, seen: set[int] | None = None) -> Iterator[tuple[Any, str]]:
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    if isinstance(value, fdl.Buildable):
        seen.add(id(value))
        yield value, path
        children: Iterable[tuple[Any, Any]] = configs.arguments(value).items()
    elif isinstance(value, dict):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        return
    for key, child in children:
        yield from _buildables(child, step(path, key), seen)


def _copy_tree(source: Path, target: Path, disk: Disk, above: Collection[Path] = ()) -> None:
    real = source.resolve()
    if real in above:
        raise ContextError(f"{source} is a link to a directory above it: the artifact would have no end")
    disk.make_directory(target)
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        if entry.is_dir():
            _copy_tree(Path(entry.path), target / entry.name, disk, (*above, real))
        elif entry.is_file():
            disk.write(target / entry.name, _blocks(Path(entry.path)))
    disk.sync(target)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
