"""Checkpoints that two ranks write together."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from helpers.engine import faults, names_in, step_in
from helpers.two_ranks import model_state, results
from torch.distributed.checkpoint import load as dcp_load

from nemologger.checkpoint.manifest import read
from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.weights import read_metadata

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    """Where the two ranks write."""
    directory = tmp_path_factory.getbasetemp() / "two_ranks"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def seen(directory):
    """What each of them saw."""
    return results(directory)


@pytest.fixture(scope="session")
def model(seen, directory) -> Path:
    """A checkpoint that both wrote."""
    assert [rank["model"].get("value") for rank in seen] == ["saved", "saved"], seen
    return directory / "run" / "model"


def test_what_two_wrote_one_can_load(model):
    loaded, wanted = load_checkpoint(model), model_state(0)
    for name, tensor in wanted["state_dict"].items():
        assert torch.equal(loaded["state_dict"][name], tensor), name
    for number, state in wanted["optimizer_states"][0]["state"].items():
        assert torch.equal(loaded["optimizer_states"][0]["state"][number]["exp_avg"], state["exp_avg"])
    assert read(model).world_size == 2
    assert faults(model) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_two_wrote_stock_torch_reads(model):
    state = {"state_dict": {name: torch.zeros_like(t) for name, t in model_state(0)["state_dict"].items()}}
    dcp_load(state, checkpoint_id=model / "weights", no_dist=True)
    assert torch.equal(state["state_dict"]["w3"], model_state(0)["state_dict"]["w3"])


def test_a_buffer_is_rank_zeros(model):
    assert torch.equal(load_checkpoint(model)["state_dict"]["running_mean"], torch.zeros(30))


@pytest.mark.parametrize("size", [5, 2000])
def test_a_buffer_of_another_size_on_another_rank_is_its_own_affair(seen, directory, size):
    """Metrics that collect, memory banks: as long as what that rank has seen."""
    assert [rank["buffers"].get("value") for rank in seen] == ["saved", "saved"], seen
    loaded, wanted = load_checkpoint(directory / "buffers" / str(size)), model_state(0)
    assert torch.equal(loaded["state_dict"].pop("running_mean"), torch.zeros(size))
    assert loaded["state_dict"].keys() == {f"w{i}" for i in range(5)}
    for name, tensor in loaded["state_dict"].items():
        assert torch.equal(tensor, wanted["state_dict"][name]), name
    assert faults(directory / "buffers" / str(size)) == []


def test_every_element_is_written_once(model):
    metadata = read_metadata(model / "weights")
    for key, entry in metadata.state_dict_metadata.items():
        covered = torch.zeros(entry.size, dtype=torch.int32)
        for chunk in entry.chunks:
            covered[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert (covered == 1).all(), key
        assert len([index for index in metadata.storage_data if index.fqn == key]) == len(entry.chunks)


def test_the_ranks_write_about_as_much_each(model):
    metadata = read_metadata(model / "weights")
    bytes_of = [0, 0]
    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        (chunk,) = (chunk for chunk in entry.chunks if chunk.offsets == index.offset)
        bytes_of[int(info.relative_path.split("_")[2])] += chunk.sizes.numel() * entry.properties.dtype.itemsize
    assert max(bytes_of) <= 1.1 * min(bytes_of)


def test_two_files_for_each_rank(model):
    shards = {path.name for path in (model / "weights").glob("*.distcp")}
    assert shards == {f"__{rank}_{index}.distcp" for rank in (0, 1) for index in (0, 1)}


def test_a_tiny_state_too(seen, directory):
    assert [rank["scalars"].get("value") for rank in seen] == ["saved", "saved"]
    assert step_in(directory / "run" / "scalars") == 3


@pytest.mark.parametrize(("what", "who"), [("full disk", 1), ("full disk on rank 0", 0)])
def test_a_full_disk_of_one_rank_fails_the_save_on_both(seen, what, who):
    for rank in seen:
        assert rank[what]["error"] == "SaveFailedError"
        assert "No space left on device" in rank[what]["message"]
    assert f"rank {who}: OSError" in seen[1 - who][what]["message"]


def test_after_a_failed_save_the_previous_is_the_newest(seen):
    for rank in seen:
        assert rank["newest after a full disk"]["value"] == 1
        assert rank["newest after differences"]["value"] == 1
        assert rank["newest"]["value"] == 3


def test_failed_saves_leave_nothing(seen, directory):
    found = names_in(directory / "run")
    # Rank 0's disk was gone for good, so it could not clean up; the next run does.
    assert found - {"full0", "full0-unfinished", ".full0-unfinished.partial"} == {"first", "model", "scalars"}


@pytest.mark.parametrize("what", ["other names", "other shapes", "other dtypes"])
def test_ranks_that_hold_other_tensors_cannot_save(seen, what):
    for rank in seen:
        assert rank[what]["error"] == "SaveFailedError"
        assert "ranks [1] hold other tensors than rank 0" in rank[what]["message"]


def test_a_directory_that_only_rank_0_sees_is_refused_before_training(seen, directory):
    """A directory of each node has the same path, and is another one."""
    for shared in ("a shared directory", "a directory seen late"):
        assert [rank[shared].get("error") for rank in seen] == [None, None]
    assert list((directory / "shared").iterdir()) == []
    for rank in seen:
        told = rank["a directory each"]
        assert told["error"] == "ConfigurationError"
        assert f"rank 1 on {socket.gethostname()} does not see what rank 0" in told["message"]
        assert "must be on a file system that they share" in told["message"]
