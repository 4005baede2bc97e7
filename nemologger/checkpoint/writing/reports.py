"""What a rank's writer tells rank 0, which cannot hear it: a small file beside its own, once all of them are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from nemologger import names
from nemologger.checkpoint.manifest import FileRecord

_NAME = ".written-by-rank-{}"


def report_of(checkpoint: Path, rank: int) -> Path:
    """Where the writer of ``rank`` says that its part of ``checkpoint`` is there."""
    return checkpoint / names.WEIGHTS / _NAME.format(rank)


def dumps(records: Mapping[str, FileRecord]) -> bytes:
    """The content of a report: every file, by its path below the checkpoint."""
    return json.dumps({name: asdict(record) for name, record in records.items()}).encode()


def loads(content: bytes) -> dict[str, FileRecord]:
    """What :func:`dumps` was given."""
    return {name: FileRecord(one["size"], tuple(one["blocks"])) for name, one in json.loads(content).items()}


def merged(shares: Iterable[Mapping[str, FileRecord]]) -> dict[str, FileRecord]:
    """The files of all ranks."""
    return {name: record for share in shares for name, record in share.items()}
