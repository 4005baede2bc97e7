"""Two gloo ranks under DDP: they save together, and their checkpoints load on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import python, torchrun
from toy import BATCH, ToyModel, manifests, names

from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.verify import problems

SCRIPT = Path(__file__).with_name("train_toy.py")
WIDTH = 256

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def lives(tmp_path_factory) -> dict[str, Path]:
    """A run of three lives: 2 ranks to step 4, one process to step 6, 2 ranks (started by Lightning) to step 8."""
    directory = tmp_path_factory.mktemp("lives")
    checkpoints = directory / "toy" / "checkpoints"
    kept = {}
    for steps, start in ((4, "torchrun"), (6, "alone"), (8, "lightning")):
        arguments = [directory, steps, "--every", 2, "--width", WIDTH]
        if start == "torchrun":
            torchrun(SCRIPT, 2, *arguments, "--devices", 2)
        else:
            python(SCRIPT, *arguments, "--devices", 2 if start == "lightning" else 1)
        last = checkpoints / f"step={steps}-last"
        assert last.is_dir(), names(checkpoints)
        kept[start] = last.rename(tmp_path_factory.mktemp("kept") / last.name)
        last.symlink_to(kept[start])
    return kept


def test_each_life_went_on_from_the_one_before(lives):
    seen = {start: manifests(path.parent)[path.name] for start, path in lives.items()}
    assert [m.step for m in seen.values()] == [4, 6, 8]
    assert [m.world_size for m in seen.values()] == [2, 1, 2]
    # two ranks see two batches a step
    assert [m.consumed_samples for m in seen.values()] == [8 * BATCH, 10 * BATCH, 14 * BATCH]


def test_each_rank_writes_its_share(lives):
    weights = lives["torchrun"] / "weights"
    assert [n for n in names(weights) if n.endswith(".distcp")] == [
        "__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__1_1.distcp",
    ]  # fmt: skip
    metadata = dcp.FileSystemReader(weights).read_metadata()
    written = [0, 0]
    for index, info in metadata.storage_data.items():
        tensor = metadata.state_dict_metadata[index.fqn]
        chunk = next(c for c in tensor.chunks if c.offsets == index.offset)
        written[int(info.relative_path[2])] += chunk.sizes.numel() * tensor.properties.dtype.itemsize
    assert max(written) < 1.1 * min(written)
    for key, tensor in metadata.state_dict_metadata.items():
        stored = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        assert stored == tensor.size.numel(), f"{key} is not stored exactly once"


@pytest.mark.parametrize("start", ["torchrun", "alone", "lightning"])
def test_every_checkpoint_is_whole_and_stock_torch_reads_it(lives, start):
    path = lives[start]
    assert problems(path) == []
    ours = load_checkpoint(path)
    model = ToyModel(width=WIDTH)
    state = {"state_dict": {key: torch.full_like(value, 7) for key, value in model.state_dict().items()}}
    dcp.load(state, checkpoint_id=str(path / "weights"), no_dist=True)
    model.load_state_dict(state["state_dict"])
    assert all(torch.equal(state["state_dict"][key], value) for key, value in ours["state_dict"].items())
    assert len(ours["optimizer_states"][0]["state"]) == len(list(model.parameters()))
    assert {int(s["step"]) for s in ours["optimizer_states"][0]["state"].values()} == {int(path.name[5])}


def test_buffers_are_rank_zeros(lives):
    """The running statistics of a batch norm differ between ranks; a mix of them would belong to none."""
    weights = lives["torchrun"] / "weights"
    stored = dcp.FileSystemReader(weights).read_metadata().storage_data
    files = {index.fqn: info.relative_path for index, info in stored.items() if "running" in index.fqn}
    assert files
    assert all(name.startswith("__0_") for name in files.values())
