"""Tensors straight into their memory, or the ordinary way, with the same result."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.engine import save

from nemologger.checkpoint.reading import read
from nemologger.checkpoint.reading.read import read_parts, read_tensors
from nemologger.checkpoint.weights import described, payloads
from nemologger.errors import DamagedCheckpointError, ModelMismatchError


@pytest.fixture
def weights(tmp_path):
    save(tmp_path / "x", 1)
    return tmp_path / "x" / "weights"


def _empty(weights):
    return {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in described(weights).items()}


def test_all_of_ours_is_read_directly(weights):
    assert set(payloads(weights, _empty(weights))) == set(described(weights))


def test_both_ways_give_the_same(weights, monkeypatch):
    direct = read_tensors(weights)
    monkeypatch.setattr(read, "payloads", lambda weights, tensors: {})
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


def test_no_python_copy_of_the_data_is_made(tmp_path):
    from nemologger.checkpoint.manifest import Manifest
    from nemologger.checkpoint.state import snapshot
    from nemologger.checkpoint.writing.saver import Saver
    from nemologger.disk import LocalDisk
    from nemologger.ranks import SingleProcess

    state = {"state_dict": {"w": torch.ones(5_000_000)}}
    Saver(LocalDisk(), SingleProcess()).save(snapshot.take(state), tmp_path / "x", Manifest(step=1, epoch=0))
    tracemalloc.start()
    read_tensors(tmp_path / "x" / "weights")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
