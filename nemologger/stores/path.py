"""Paths in object stores, with the part of ``pathlib.Path``'s methods that reading a checkpoint needs.

:func:`storage_path` gives one or the other, and whoever reads does not care. Reading is all they do: what is written,
linked or removed goes through :class:`~nemologger.stores.remote_disk.RemoteDisk`.

A store has no symbolic links. A ``-last`` that points to another checkpoint is a small object ``<name>-last.link`` with that
one's name in it, which the methods here follow.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat as modes
from collections.abc import Iterator, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from nemologger import names
from nemologger.condition import kind_of
from nemologger.errors import ConfigurationError
from nemologger.stores.client import check_protocol
from nemologger.stores.store import Store

LINK = ".link"

_BUFFER = 4 << 20
_URL = re.compile(r"(?P<root>(?P<protocol>[a-zA-Z][a-zA-Z0-9+.-]*)://[^/]*)(?P<key>/.*)?", re.DOTALL)
_LACKING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # of this process or machine
_COLLAPSED = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")


class StorePath:
    """An object, or the directory that objects make of their names.

    Nothing is remembered: each method asks the store.

    Args:
        store: Where.
        key: The names on the way there.
    """

    def __init__(self, store: Store, key: tuple[str, ...] = ()) -> None:
        self.store = store
        self._key = key

    # --- names ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return "/".join((self.store.root, *self._key))

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __reduce__(self) -> Any:
        return StorePath, (self.store, self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and (self.store, self._key) == (other.store, other._key)

    def __hash__(self) -> int:
        return hash((self.store, self._key))

    def __lt__(self, other: StorePath) -> bool:
        return self._key < other._key

    def __truediv__(self, below: str | os.PathLike[str]) -> StorePath:
        more = tuple(name for name in os.fspath(below).split("/") if name not in ("", "."))
        return StorePath(self.store, (*self._key, *more))

    @property
    def name(self) -> str:
        """The last name."""
        return self._key[-1] if self._key else ""

    @property
    def suffix(self) -> str:
        """The ending of the last name, such as ``.ckpt``."""
        return Path(self.name).suffix

    @property
    def parent(self) -> StorePath:
        """The directory it is in."""
        return StorePath(self.store, self._key[:-1])

    @property
    def parents(self) -> list[StorePath]:
        """All directories above, the nearest first."""
        return [StorePath(self.store, self._key[:end]) for end in reversed(range(len(self._key)))]

    def with_name(self, name: str) -> StorePath:
        """Its neighbour of that name."""
        return self.parent / name

    def within(self, store: Store) -> Path:
        """The same path, by way of ``store``, which equals its own."""
        return cast(Path, StorePath(store, self._key))

    def as_posix(self) -> str:
        """The URL."""
        return str(self)

    def relative_to(self, other: StorePath) -> Path:
        """The names from ``other`` to here.

        Raises:
            ValueError: If it is not below ``other``.
        """
        if self.store != other.store or self._key[: len(other._key)] != other._key:
            raise ValueError(f"{self} is not below {other}")
        return Path(*self._key[len(other._key) :])

    def is_relative_to(self, other: StorePath) -> bool:
        """Whether it is ``other``, or below it."""
        return self.store == other.store and self._key[: len(other._key)] == other._key

    def absolute(self) -> StorePath:
        """Itself."""
        return self

    def expanduser(self) -> StorePath:
        """Itself."""
        return self

    def resolve(self) -> StorePath:
        """Where it is, once links are followed."""
        for index, name in enumerate(self._key):
            if name.endswith(names.LAST):
                target = _target(self.store, StorePath(self.store, self._key[: index + 1]))
                if target is not None:
                    return StorePath(self.store, (*self._key[:index], target, *self._key[index + 1 :]))
        return self

    # --- what is there --------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is an object, or one below."""
        return self._kind() is not None

    def is_dir(self) -> bool:
        """Whether there are objects below. There may be one of this very name, too: some tools mark directories so."""
        kind = self._kind()
        return kind == "directory" or (kind == "file" and bool(self.store.names(str(self.resolve()))))

    def is_file(self) -> bool:
        """Whether there is an object."""
        return self._kind() == "file"

    def is_symlink(self) -> bool:
        """Whether it is a ``-last`` that points to another checkpoint."""
        return self.name.endswith(names.LAST) and _target(self.store, self) is not None

    def readlink(self) -> StorePath:
        """What it points to.

        Raises:
            FileNotFoundError: If it is no link.
        """
        target = _target(self.store, self)
        if target is None:
            raise FileNotFoundError(f"{self} is no link")
        return self.with_name(target)

    def stat(self) -> os.stat_result:
        """Size, kind, and when it was changed: of a directory, when the newest object in it was.

        Raises:
            FileNotFoundError: If it is not there.
        """
        path = self.resolve()
        info = self.store.info(str(path))
        if info.get("type") == "directory":
            changed = max((_changed(self.store.info(str(path / below))) for below in path.sizes()), default=0.0)
            return os.stat_result((modes.S_IFDIR, 0, 0, 1, 0, 0, 0, changed, changed, changed))
        changed = _changed(info)
        return os.stat_result((modes.S_IFREG, 0, 0, 1, 0, 0, int(info["size"] or 0), changed, changed, changed))

    def samefile(self, other: object) -> bool:
        """Whether ``other`` is the same object."""
        return isinstance(other, StorePath) and self.resolve() == other.resolve()

    def _kind(self) -> str | None:
        try:
            return str(self.store.info(str(self.resolve())).get("type"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    # --- what is in it --------------------------------------------------------------------------------------------

    def iterdir(self) -> Iterator[StorePath]:
        """What is directly in the directory, links among it."""
        found = {name.removesuffix(LINK) if _is_link(name) else name for name in self.store.names(str(self.resolve()))}
        return iter([self / name for name in sorted(found)])

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """What is in the directory, by a pattern of names with ``/`` between them."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir():
            if fnmatchcase(path.name, first):
                yield from path.glob(rest) if rest else [path]

    def rglob(self, pattern: str) -> Iterator[StorePath]:
        """The objects below whose name fits."""
        return iter([self / below for below in sorted(self.sizes()) if fnmatchcase(below.rpartition("/")[2], pattern)])

    def sizes(self) -> dict[str, int]:
        """The size of every object below, by its path seen from here; one request for a thousand of them."""
        return self.store.below(str(self.resolve()))

    # --- bytes ----------------------------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """The object."""
        return self.store.read(str(self.resolve()))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object, decoded."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None) -> Any:
        """The object as a file for reading.

        Raises:
            ValueError: For any other mode than ``r`` and ``rb``.
        """
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: mode {mode!r}; a store's objects are written whole, by RemoteDisk")
        raw = _Object(self.store, str(self.resolve()))
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw, max(buffering, _BUFFER))
        return buffered if mode == "rb" else io.TextIOWrapper(buffered, encoding or "utf-8")


class _Object(io.RawIOBase):
    """An object as a file: every read is a request for just that range."""

    def __init__(self, store: Store, url: str) -> None:
        self._store = store
        self._url = url
        self._size = int(store.info(url)["size"] or 0)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        end = min(self._position + len(target), self._size)
        if end <= self._position:
            return 0
        data = self._store.read_at_once(self._url, self._position, end)
        target[: len(data)] = data
        self._position += len(data)
        return len(data)


def is_path(value: object) -> bool:
    """Whether ``value`` may name a place on a disk or in a store.

    Example:
        >>> is_path("s3://bucket/key"), is_path(None), is_path("")
        (True, False, False)
    """
    return isinstance(value, str | os.PathLike | StorePath) and value != ""


def check_options(options: object) -> None:
    """Refuse ``storage_options`` that are none.

    Raises:
        ConfigurationError: They are no dictionary.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigurationError(
            f"storage_options is {kind_of(options)}: expected a dictionary of what the fsspec file system takes"
        )


def storage_path(
    where: str | os.PathLike[str] | StorePath, options: Mapping[str, Any] | None = None, argument: str = "the path"
) -> Path:
    """The path that ``where`` names: of the local file system, or (a URL) of a store.

    Args:
        where: A path, or a URL such as ``s3://bucket/key``.
        options: For the store's client; see :class:`~nemologger.stores.store.Store`.
        argument: What the caller calls it, for the error.

    Raises:
        ConfigurationError: If it is no path, or a URL that cannot work here; or if ``options`` are none.

    Example:
        >>> storage_path("runs/demo")
        PosixPath('runs/demo')
        >>> (storage_path("memory://runs/demo") / "checkpoints").name
        'checkpoints'
    """
    if isinstance(where, StorePath):
        return cast(Path, where)
    if not is_path(where):
        found = kind_of(where) if where != "" else "empty"
        raise ConfigurationError(f"{argument} is {found}: expected a path, or a URL such as s3://bucket/key")
    check_options(options)
    text = os.fspath(where)
    if "::" in text and "://" in text:
        raise ConfigurationError(f"{text!r}: chained URLs cannot be used, name the store itself")
    url = _URL.fullmatch(text)
    if url is None:
        if _COLLAPSED.match(text) and not Path(where).exists():
            raise ConfigurationError(
                f"{where!r}: a URL has two slashes, of which pathlib makes one; give it as a string"
            )
        return Path(where)
    protocol, key = url["protocol"].lower(), url["key"] or ""
    if protocol in ("file", "local"):
        return Path(text[len(protocol) + 3 :])
    root = f"{protocol}://{url['root'].partition('://')[2]}"
    if root.endswith("://") and protocol != "memory":
        raise ConfigurationError(f"{text!r} names no bucket: {protocol}://<bucket>/<key>")
    check_protocol(root)
    return cast(Path, StorePath(Store(root, options), tuple(name for name in key.split("/") if name)))


def in_store(path: Path) -> StorePath | None:
    """``path`` if it is one of a store, else None."""
    return path if isinstance(cast(Any, path), StorePath) else None  # type: ignore[return-value]


def is_unknown(path: Path, error: OSError) -> bool:
    """Whether ``error`` says nothing of what is at ``path``: a store that does not answer, or does not let us look.

    A disk that cannot read a file will not read it tomorrow either. A store that is back has every byte; so has a disk when
    this process has what it lacks now.
    """
    if error.errno in _LACKING:
        return True
    absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return in_store(path) is not None and not isinstance(error, absent)


def link_to(name: str) -> bytes:
    """What a link holds that points to the checkpoint ``name`` beside it."""
    return json.dumps({"points_to": name}).encode()


def _is_link(name: str) -> bool:
    return name.endswith(names.LAST + LINK)


def _target(store: Store, path: StorePath) -> str | None:
    """The name that the link at ``path`` points to, or None if there is none."""
    try:
        return str(json.loads(store.read(str(path) + LINK))["points_to"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return ""  # a link, but to nothing


def _changed(info: Mapping[str, Any]) -> float:
    for key in ("LastModified", "last_modified", "mtime", "updated", "modified", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
