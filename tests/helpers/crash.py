"""A file system in memory that knows what a crash can leave of it.

Contents of files are durable when they are written (:class:`~nemologger.disk.Disk` says so), entries of a directory only
once that directory was synced: after a power failure any of the entries made since may be there or not. Operations that a
kernel does one by one, as the removal of a tree, are steps of their own. A rename within one directory is atomic.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.engine import faults, names_in
from nemologger.checkpoint import commit
from nemologger.checkpoint.find import Status, newest, survey
from nemologger.disk import LocalDisk


@dataclass(eq=False)
class Folder:
    """A directory: what it holds, what of that is durable, and the changes in between."""

    entries: dict[str, Any] = field(default_factory=dict)
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)

    def change(self, changes: dict[str, Any]) -> None:
        _apply(self.entries, changes)
        self.pending.append(changes)

    def sync(self) -> None:
        self.durable = dict(self.entries)
        self.pending = []

    def after_crash(self, survives: Callable[[], bool]) -> dict[str, Any]:
        entries = dict(self.durable)
        for changes in self.pending:
            if survives():
                _apply(entries, changes)
        return entries


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


class CrashModel:
    """Replays the operations of a recording below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = Folder()

    def steps(self, operation: tuple[Any, ...]) -> Iterator[None]:
        """Do ``operation``; stop after each step that a crash can fall behind."""
        method, *arguments = operation
        yield from getattr(self, f"_{method}")(*arguments)

    def crash(self, survives: Callable[[], bool]) -> dict[str, Any]:
        """What is on disk after a crash: relative path -> bytes, a :class:`Link`, or None for a directory.

        Args:
            survives: Asked for each change of an entry that was not synced.
        """
        found: dict[str, Any] = {}

        def walk(folder: Folder, prefix: str) -> None:
            for name, node in folder.after_crash(survives).items():
                found[prefix + name] = None if isinstance(node, Folder) else node
                if isinstance(node, Folder):
                    walk(node, f"{prefix}{name}/")

        walk(self._top, "")
        return found

    def _folder(self, path: Path) -> Folder:
        folder = self._top
        for part in path.relative_to(self._root).parts:
            folder = folder.entries[part]
        return folder

    def _make_directory(self, path: Path) -> Iterator[None]:
        folder = self._top
        for part in path.relative_to(self._root).parts:
            if part not in folder.entries:
                folder.change({part: Folder()})
                yield
            folder = folder.entries[part]

    def _write(self, path: Path, content: bytes) -> Iterator[None]:
        self._folder(path.parent).change({f".{path.name}.partial": content})
        yield
        self._folder(path.parent).change({f".{path.name}.partial": None, path.name: content})
        yield

    def _link(self, source: Path, target: Path) -> Iterator[None]:
        self._folder(target.parent).change({target.name: self._folder(source.parent).entries[source.name]})
        yield

    def _symlink(self, path: Path, points_to: str) -> Iterator[None]:
        self._folder(path.parent).change({path.name: Link(points_to)})
        yield

    def _rename(self, source: Path, target: Path) -> Iterator[None]:
        folder = self._folder(source.parent)
        folder.change({source.name: None, target.name: folder.entries[source.name]})
        yield

    def _remove(self, path: Path) -> Iterator[None]:
        try:
            folder = self._folder(path.parent)
            node = folder.entries[path.name]
        except KeyError:
            return
        if isinstance(node, Folder):
            for name in list(node.entries):
                yield from self._remove(path / name)
        folder.change({path.name: None})
        yield

    def _sync(self, directory: Path) -> Iterator[None]:
        self._folder(directory).sync()
        yield


def crashes(run: Path, operations: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """What a crash after any of the ``operations`` below ``run`` can leave, each once, from the first note on.

    Of the changes that were not synced all, none, or random ones are there. With it comes the latest note, and when it was.
    """
    model, dice, noted = CrashModel(run), random.Random(0), 0
    seen: set[tuple[Any, ...]] = set()
    for number, operation in enumerate(operations):
        if operation[0] == "note":
            noted = operation[1]
            continue
        for _ in model.steps(operation):
            for survives in (lambda: True, lambda: False, *[lambda: dice.random() < 0.5] * 4):
                state = model.crash(survives)
                key = (noted, *sorted((name, hash(node)) for name, node in state.items()))
                if noted and key not in seen:
                    seen.add(key)
                    yield noted, state, f"{number}: {operation[:2]}"


def materialize(state: dict[str, Any], root: Path) -> None:
    """Make ``state`` real below ``root``."""
    root.mkdir(parents=True)
    for name, node in state.items():
        path = root / name
        if node is None:
            path.mkdir(exist_ok=True)
        elif isinstance(node, Link):
            path.symlink_to(node.target)
        else:
            path.write_bytes(node)


def check_resumable(directory: Path, published: int, when: str) -> None:
    """A run finds a complete checkpoint in ``directory``, of step ``published`` or later, and tidies up the rest."""
    said: list[str] = []
    found = newest(survey(directory), faults, said.append)
    assert found is not None, when
    assert found.status is Status.COMPLETE, when
    assert found.manifest.step >= published, when
    # What a save or a removal was at when the machine died is known as such; no complete one was damaged.
    assert not [line for line in said if "have changed" in line or "bytes," in line], (when, said)
    commit.tidy(LocalDisk(), directory)
    left = names_in(directory)
    assert not [name for name in left if name.endswith(("-unfinished", "-replaced", ".partial"))], (when, left)
    assert {one.status for one in survey(directory)} == {Status.COMPLETE}, when
    after = newest(survey(directory), faults, said.append)
    assert after.manifest.step == found.manifest.step, when


def _apply(entries: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, node in changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node
