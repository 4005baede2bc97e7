"""Checkpoints in an object store: ours and torch's own fsspec writer and reader, taking turns, over a local S3 server.

    python benchmarks/object_store.py            # about two minutes
    python benchmarks/object_store.py --small    # under half a minute
    python benchmarks/object_store.py --url s3://bucket/scratch   # a store of yours: the environment says how to reach it

The server (moto) is one Python process and takes most of the time: ratios say who asks it for less, not what a real store
gives. Ours also makes checksums while writing and compares them while reading.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.reading.read import read_tensors
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing.saver import Saver
from nemologger.ranks import SingleProcess
from nemologger.stores.path import storage_path
from nemologger.stores.remote_disk import OverlappingDisk, disk_of


@contextmanager
def server() -> Iterator[str]:
    """A local S3 server with a bucket; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ.update(
        AWS_ACCESS_KEY_ID="bench",
        AWS_SECRET_ACCESS_KEY="bench",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
    )
    try:
        import boto3

        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket="bench")
        yield "s3://bench/runs"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="52 MB and three turns rather than 400 MB and five")
    parser.add_argument("--url", help="a directory in a store; what is below it is removed")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    megabytes, turns = (52, 3) if arguments.small else (400, 5)
    tensors = {f"layer{i}": torch.randn(megabytes * 250_000 // 13) for i in range(13)}
    if arguments.url:
        compare(arguments.url, tensors, turns)
    else:
        with server() as url:
            compare(url, tensors, turns)


def compare(url: str, tensors: dict[str, torch.Tensor], turns: int) -> None:
    """Let all ways take turns below ``url``."""
    root = storage_path(url)
    disk = disk_of(root)
    if disk is None:
        raise SystemExit(f"{url} is no URL of a store")
    saver = Saver(OverlappingDisk(disk.store), SingleProcess())

    def save_ours() -> None:
        saver.save(take({"state_dict": tensors}), root / "ours", Manifest(step=1, epoch=0))

    def save_torch(threads: int) -> Callable[[], None]:
        def save() -> None:
            writer = FsspecWriter(f"{url}/torch-{threads}", sync_files=False, thread_count=threads)
            dcp.save({"state_dict": tensors}, storage_writer=writer, no_dist=True)

        return save

    def load_ours() -> None:
        read_tensors(root / "ours" / "weights")

    def load_torch() -> None:
        state = {"state_dict": {key: torch.empty_like(value) for key, value in tensors.items()}}
        dcp.load(state, storage_reader=FsspecReader(f"{url}/torch-1"), no_dist=True)

    ways = {
        "save, nemologger": save_ours,
        "save, FsspecWriter()": save_torch(1),
        "save, FsspecWriter(thread_count=4)": save_torch(4),
        "load, nemologger": load_ours,
        "load, FsspecReader()": load_torch,
    }
    written = {
        "save, nemologger": "ours",
        "save, FsspecWriter()": "torch-1",
        "save, FsspecWriter(thread_count=4)": "torch-4",
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            if name in written:
                disk.remove(root / written[name])
            start = time.perf_counter()
            way()
            if turn:  # the first opens connections
                seconds[name].append(time.perf_counter() - start)
    disk.remove(root)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    print(f"{size:.0f} MB, {turns} turns\n\n| | s | MB/s | ours is so many times as fast |\n|---|---|---|---|")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        ours = statistics.median(seconds[f"{name[:4]}, nemologger"])
        print(f"| {name} | {middle:.3f} | {size / middle:.0f} | {middle / ours:.2f} |")


if __name__ == "__main__":
    main()
