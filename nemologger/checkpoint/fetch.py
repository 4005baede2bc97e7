"""Tensors from a store into their own memory: whole blocks side by side, each checked against the manifest as it comes.

A request costs a store more than the bytes it brings, so what is fetched is not tensors but the blocks they lie in, those
that the manifest has checksums of. Headers are looked at on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import xxhash

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import BLOCK, FileRecord
from nemologger.checkpoint.stage import memory_of
from nemologger.checkpoint.weights import Payload
from nemologger.errors import DamagedCheckpointError
from nemologger.store_path import StorePath

_AT_ONCE = 8


@dataclass(frozen=True)
class _Wanted:
    """Bytes of a file from ``start`` on: a payload for ``target``, or a header that is to be as ``expected``."""

    key: str
    start: int
    target: memoryview | None = None
    expected: bytes = b""

    @property
    def end(self) -> int:
        return self.start + len(self.expected if self.target is None else self.target)


def fetch(weights: StorePath, known: Mapping[str, Sequence[Payload]], tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Fill ``tensors`` from the places that are ``known``.

    Returns:
        The keys whose headers were not as expected: what is in those tensors now means nothing.

    Raises:
        DamagedCheckpointError: If a file is missing, too short, or not as it was written.
    """
    weights = weights.resolve()
    records = _records(weights)
    blocks: dict[tuple[str, int], list[_Wanted]] = {}
    for key, group in known.items():
        for payload in group:
            body = payload.header_start + len(payload.header)
            for wanted in (
                _Wanted(key, payload.header_start, expected=payload.header),
                _Wanted(key, body, memory_of(tensors[key], payload.piece)),
            ):
                for number in range(wanted.start // BLOCK, -(-wanted.end // BLOCK)):
                    blocks.setdefault((payload.file, number), []).append(wanted)

    def one(block: tuple[tuple[str, int], list[_Wanted]]) -> set[str]:
        (file, number), wanted = block
        return _fetch(weights / file, number, wanted, records.get(f"{names.WEIGHTS}/{file}"))

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="nemologger-fetch") as pool:
        return {key for strange in pool.map(one, sorted(blocks.items(), key=lambda b: b[0])) for key in strange}


def _fetch(path: StorePath, number: int, wanted: list[_Wanted], record: FileRecord | None) -> set[str]:
    """Fetch a block, hand out what is wanted of it, and say whose header is not as expected."""
    start = number * BLOCK
    try:
        block = memoryview(path.store.read(str(path), start, start + BLOCK))
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read from byte {start} on: {error.strerror}") from error
    expected = record.blocks[number] if record is not None and number < len(record.blocks) else None
    if expected is not None and xxhash.xxh3_64_hexdigest(block) != expected:
        raise DamagedCheckpointError(
            f"{path}: its bytes {start} to {start + len(block) - 1} have changed since they were written"
        )
    strange = set()
    for one in wanted:
        first, last = max(one.start, start), min(one.end, start + BLOCK)
        if first >= last:  # nothing of it: an empty tensor
            continue
        found = block[first - start : last - start]
        if len(found) != last - first:
            raise DamagedCheckpointError(f"{path} ends at byte {start + len(block)}, in the middle of {one.key}")
        if one.target is not None:
            one.target[first - one.start : last - one.start] = found
        elif found != one.expected[first - one.start : last - one.start]:
            strange.add(one.key)
    return strange


def _records(weights: StorePath) -> dict[str, FileRecord]:
    """What the manifest says of the files; nothing if there is none, because another tool wrote them."""
    checkpoint = weights.parent
    if not (checkpoint / names.MANIFEST).exists():
        return {}
    return manifests.read(cast(Path, checkpoint)).files
