"""Where something is among what was looked into: ``"dataset.transform.rng"``, ``"file:STATE.rng"``."""

from __future__ import annotations

from collections.abc import Iterator


def parent_of(path: str) -> str:
    """The place of the object that has the attribute at ``path``."""
    return path.rpartition(".")[0]


def root_of(path: str) -> str:
    """The name of the root that ``path`` begins with."""
    return path.partition(".")[0]


def way_to(path: str) -> Iterator[str]:
    """The places that ``path`` leads through, from its root to itself."""
    file, colon, rest = path.rpartition(":")
    names = rest.split(".")
    return (file + colon + ".".join(names[:count]) for count in range(1, len(names) + 1))
