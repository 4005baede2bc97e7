"""Files of lines that this package writes itself, life after life of a run."""

from __future__ import annotations

import itertools
from pathlib import Path

from nemologger.disk import LocalDisk


def read_lines(path: Path) -> list[str]:
    """The lines of ``path`` with their ends; without a last one that a killed process did not write to its end."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return [line for line in file if line.endswith("\n")]


def is_whole(path: Path) -> bool:
    """Whether the last line of ``path`` was written to its end."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def put_aside(path: Path) -> Path:
    """Rename ``metrics.csv`` to the first of ``metrics-0.csv``, ``metrics-1.csv``, … that is free."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count())
    aside = next(name for name in numbered if not name.exists())
    LocalDisk().rename(path, aside)
    return aside
