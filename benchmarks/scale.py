"""What a save and a load cost with thousands of ranks, apart from the tensors.

That is planning, the exchange with rank 0, manifest and commit; and for a load, what each rank reads to find its own parts.

No processes are started: every rank's part of the work is done here, one after the other, by the functions that a run uses.
The model is sharded as FSDP2 does it, each tensor over all ranks. Seconds are of the processor; what a file system or a
network adds is its own. ``python benchmarks/scale.py [--ranks 1024 8192]``
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from nemologger import names
from nemologger.checkpoint import commit, manifest
from nemologger.checkpoint.manifest import BLOCK, FileRecord, Manifest
from nemologger.checkpoint.state.shares import Part, Shape
from nemologger.checkpoint.state.snapshot import Snapshot
from nemologger.checkpoint.weights import metadata, payloads, read_metadata
from nemologger.checkpoint.writing.plan import entries_of, files_of
from nemologger.disk import LocalDisk

ROWS = 16384
COLUMNS = 1024


def part_of_rank(rank: int, world: int) -> Part:
    """A tensor's rows, divided as ``torch.chunk`` does."""
    each = -(-ROWS // world)
    begin, end = min(rank * each, ROWS), min((rank + 1) * each, ROWS)
    return Part(Shape((end - begin, COLUMNS), 4), (begin, 0), (rank,))


def measure(world: int, tensors: int) -> dict[str, float]:
    keys = [f"state_dict.layers.{i}.weight" for i in range(tensors)]
    weight = torch.empty(ROWS, COLUMNS, device="meta")
    snapshot = Snapshot(dict.fromkeys(keys, weight), {key: ("state_dict", key.split(".", 1)[1]) for key in keys})
    figures: dict[str, float] = {"ranks": world, "tensors": tensors}
    plans, messages, stored = [], 0, []
    for rank in range(world):
        begin = time.process_time()
        files = files_of(rank, world, dict.fromkeys(keys, part_of_rank(rank, world)), snapshot, files_per_rank=2)
        entries = entries_of(files)
        plans.append(time.process_time() - begin)
        message = pickle.dumps(entries)
        messages += len(message)
        stored += pickle.loads(message)
    figures["plan of one rank, s"] = sorted(plans)[len(plans) // 2]
    figures["to rank 0, once, MB"] = messages / 1e6
    with timed(figures, "metadata on rank 0, once, s"):
        described = metadata(snapshot.tensors, snapshot.paths, stored)
    figures["metadata, MB"] = len(described) / 1e6
    del stored
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / names.DCP_METADATA).write_bytes(described)
        del described
        with timed(figures, "metadata read, on each rank, s"):
            read = read_metadata(Path(scratch))
        last = part_of_rank(world - 1, world)
        with timed(figures, "own parts found, on each rank, s"):
            own = payloads(Path(scratch), dict.fromkeys(keys, (last.offsets, last.shape.sizes)), read)
        figures["files to read, of one rank"] = len({payload.file for group in own.values() for payload in group})
        del read
    size = ROWS * COLUMNS * 4 * tensors // world // 2
    records = {
        names.shard(rank, i): FileRecord(size, ("0123456789abcdef",) * -(-size // BLOCK))
        for rank in range(world)
        for i in range(2)
    }
    figures["to rank 0, each save, MB"] = sum(len(pickle.dumps({n: r})) for n, r in records.items()) / 1e6
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "step=1"
        disk = LocalDisk()
        commit.begin(disk, checkpoint)
        weights = checkpoint / names.WEIGHTS
        for name in records:
            (weights / name).touch()
        complete = Manifest(
            step=1, epoch=0, name=checkpoint.name, world_size=world,
            files={f"{names.WEIGHTS}/{name}": record for name, record in records.items()},
        )  # fmt: skip
        with timed(figures, "commit on rank 0, s"):
            commit.publish(disk, checkpoint, complete)
        figures["manifest, MB"] = (checkpoint / names.MANIFEST).stat().st_size / 1e6
        with timed(figures, "manifest read, s"):
            manifest.read(checkpoint)
    return figures


@contextmanager
def timed(figures: dict[str, float], name: str):
    begin = time.process_time()
    yield
    figures[name] = time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--tensors", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    columns = [measure(world, options.tensors) for world in options.ranks]
    for name in columns[0]:
        print(f"{name:32}" + "".join(f"{column[name]:>14.4g}" for column in columns))
    if options.json is not None:
        options.json.write_text(json.dumps(columns, indent=2))


if __name__ == "__main__":
    main()
