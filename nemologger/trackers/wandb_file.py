"""What is in the file that W&B keeps of a run on disk, online and offline: ``run-<id>.wandb``.

It is a log in LevelDB's format (github.com/google/leveldb, doc/log_format.md) behind a header of 7 bytes; its records are
W&B's protocol buffers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemologger.disk.there import is_file

log = logging.getLogger(__name__)

_MAGIC = b":W&B"
_HEADER = 7  # of the file, and of each piece of a record: checksum 4, length 2, kind 1
_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def history(file: Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged, by name: as far as they are written, if the process was killed.

    Example:
        >>> import tempfile
        >>> list(history(Path(tempfile.mkdtemp(), "run-1.wandb")))
        []
    """
    from wandb.proto import wandb_internal_pb2

    for data in _records(file):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made when the module is loaded
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if record.history.HasField("step"):
                row.setdefault("_step", record.history.step.num)
            yield row


def _records(file: Path) -> Iterator[bytes]:
    data = file.read_bytes() if is_file(file) else b""
    if not data.startswith(_MAGIC):
        return
    at, parts = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left  # the block's end is filled up
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece = data[at + _HEADER : at + _HEADER + size]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(piece) < size:
            return  # written up to here
        parts = piece if kind in (_FULL, _FIRST) else parts + piece
        if kind in (_FULL, _LAST):
            yield parts
        at += _HEADER + size
