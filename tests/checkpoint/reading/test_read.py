"""Tensors straight into their memory, or the ordinary way, with the same result."""

from __future__ import annotations

import errno
import os
import resource
import tracemalloc
from contextlib import ExitStack, contextmanager, suppress

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.engine import save
from helpers.weights import places_of, write

from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.reading import read
from nemologger.checkpoint.reading.load import load_checkpoint, open_verified
from nemologger.checkpoint.reading.overlaps import Block
from nemologger.checkpoint.reading.read import read_blocks, read_parts, read_tensors
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.weights import described, payloads
from nemologger.checkpoint.writing.plan import Planner
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import LocalDisk
from nemologger.errors import DamagedCheckpointError, ModelMismatchError
from nemologger.ranks import SingleProcess


@pytest.fixture
def weights(tmp_path):
    save(tmp_path / "x", 1)
    return tmp_path / "x" / "weights"


def test_all_of_ours_is_read_directly(weights):
    assert set(places_of(weights)) == set(described(weights))


def test_both_ways_give_the_same(weights, monkeypatch):
    direct = read_tensors(weights)
    monkeypatch.setattr(read, "payloads", lambda weights, parts, metadata: {})
    ordinary = read_tensors(weights)
    assert direct.keys() == ordinary.keys()
    assert all(torch.equal(direct[key], ordinary[key]) for key in direct)


def test_what_torch_wrote_itself_is_read_too(tmp_path):
    """Also a transposed tensor, whose bytes lie in another order than its elements."""
    state = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.arange(4), "c": torch.arange(9.0)[2:5]}
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    found = read_tensors(tmp_path)
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_parts_are_read_of_what_is_asked_for_and_is_there(weights):
    whole = read_tensors(weights)
    like = {key: torch.empty_like(tensor) for key, tensor in list(whole.items())[:2]}
    found = read_parts(weights, like | {"state_dict.new": torch.empty(3)})
    assert found.keys() == like.keys()
    assert all(torch.equal(found[key], whole[key]) for key in like)


def test_of_many_ranks_files_only_those_with_a_part_are_looked_at(tmp_path):
    """Each of thousands of ranks would else open the files of all of them."""
    whole = torch.arange(64.0).reshape(16, 4)
    weights = write(tmp_path, {"a": whole, "b": whole + 1}, world=8)
    (first, last), key = (5, 8), "state_dict.a"
    (holding,) = payloads(weights, {key: ((first, 0), (last - first, 4))}).values()
    assert 0 < len(holding) < len(places_of(weights, [key])[key])
    for file in {file.name for file in weights.glob("*.distcp")} - {payload.file for payload in holding}:
        (weights / file).unlink()
    block = Block(torch.empty(last - first, 4), (first, 0))
    read_blocks(weights, {key: block}, verify=False)
    assert torch.equal(block.memory, whole[first:last])


def test_a_part_of_a_tensor_of_another_size_is_refused(weights):
    key, tensor = next((k, t) for k, t in read_tensors(weights).items() if k.startswith("state_dict."))
    with pytest.raises(ModelMismatchError, match=f"{key.removeprefix('state_dict.')} has shape"):
        read_parts(weights, {key: tensor.new_empty((*tensor.shape, 2))})


def test_a_file_that_ends_too_early_is_named(weights):
    path = weights / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DamagedCheckpointError, match=r"entry state_dict\.count cannot be read|ends at byte"):
        read_tensors(weights)


def test_a_missing_file_is_named(weights):
    (weights / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp cannot be read"):
        read_tensors(weights)


@contextmanager
def _room_for(files):
    """At most so many files more can be open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as filled:
        try:
            top = max(map(int, os.listdir("/proc/self/fd"))) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, limits[1]))
            with suppress(OSError):
                while True:
                    filled.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            resource.setrlimit(resource.RLIMIT_NOFILE, (top + files, limits[1]))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_files_are_read_than_may_be_open(tmp_path):
    """As of hundreds of ranks: 1024 are allowed in most places."""
    state = {"state_dict": {f"w{i}": torch.full((3,), float(i)) for i in range(200)}}
    saver = Saver(LocalDisk(), SingleProcess(), Planner(SingleProcess(), files_per_rank=200))
    saver.save(take(state), tmp_path / "x", Manifest(step=1, epoch=0))
    with _room_for(files=80):
        read = load_checkpoint(tmp_path / "x")["state_dict"]
    assert all(torch.equal(read[key], value) for key, value in state["state_dict"].items())


def test_that_a_process_may_open_no_more_files_is_no_damage_of_a_checkpoint(tmp_path, weights):
    """A run would go on from an older one, which could be read a moment later."""
    for look in (problems, load_checkpoint, open_verified):
        with _room_for(files=0), pytest.raises(OSError, match="Too many open files") as raised:
            look(weights.parent)
        assert raised.value.errno == errno.EMFILE


def test_no_python_copy_of_the_data_is_made(tmp_path):
    state = {"state_dict": {"w": torch.ones(5_000_000)}}
    Saver(LocalDisk(), SingleProcess()).save(take(state), tmp_path / "x", Manifest(step=1, epoch=0))
    tracemalloc.start()
    read_tensors(tmp_path / "x" / "weights")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
