"""A model spread over ranks in any way loads what any other way has saved (contract C5)."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.sharded import KINDS, STEPS, THINNED, Model, differences
from processes import ended, ranks
from toy import BATCH, SAMPLES

from nemologger import load_weights
from nemologger.checkpoint.keeping.thinning import thin
from nemologger.checkpoint.manifest import read
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.weights import described
from nemologger.disk import LocalDisk

SCRIPT = Path(__file__).with_name("helpers") / "sharded.py"
WAYS = [f"{kind}-{world}" for world, kinds in KINDS.items() for kind in kinds]

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> Path:
    """What all ways saved, and what all loaded of it."""
    directory = tmp_path_factory.mktemp("matrix")
    with ExitStack() as stack:
        log = stack.enter_context((directory / "log.txt").open("w+"))
        started = [stack.enter_context(ranks(SCRIPT, world, directory, *KINDS, out=log)) for world in KINDS]
        code = ended([rank for group in started for rank in group], timeout=500)
    assert code == 0, (directory / "log.txt").read_text()[-6000:]
    return directory


@pytest.mark.parametrize(("saved", "loaded"), list(product(WAYS, WAYS)))
def test_what_one_way_saved_another_loads(matrix, saved, loaded):
    wanted = torch.load(matrix / "state" / f"{saved}.pt")
    found = torch.load(matrix / "loaded" / f"{saved}-as-{loaded}.pt")
    assert differences(found, wanted) == []


def test_the_matrix_compares_what_was_trained(matrix):
    one, two = (torch.load(matrix / "state" / f"{way}.pt") for way in ("ddp-1", "ddp-2"))
    assert {"model: up.weight", "model: blocks.0.bias", "averages: up.weight"} <= set(differences(one, two))
    assert one["averages"].keys() == one["model"].keys() - {"seen"}
    assert not any(torch.equal(average, one["model"][name]) for name, average in one["averages"].items())
    assert float(one["optimizer"]["up.weight.step"]) == one["global_step"] == STEPS
    assert one["optimizer"]["up.weight.exp_avg"].any()
    assert (one["consumed_samples"], two["consumed_samples"]) == (STEPS * BATCH, 2 * STEPS * BATCH)


def test_tensor_parallel_ranks_see_the_same_samples(matrix):
    seen = {way: torch.load(matrix / "state" / f"{way}.pt")["consumed_samples"] for way in WAYS}
    assert seen["tp2-2"] == STEPS * BATCH
    assert seen["tp2-4"] == 2 * STEPS * BATCH
    assert seen["fsdp2-4"] == min(4 * STEPS * BATCH, SAMPLES)


@pytest.mark.parametrize("way", WAYS)
def test_the_files_are_whole_and_stock_torch_and_a_plain_module_read_them(matrix, way):
    checkpoint = matrix / "saved" / way / f"step={STEPS}"
    assert problems(checkpoint) == []
    trained = torch.load(matrix / "state" / f"{way}.pt")
    for averaged in (False, True):
        wanted = trained["model"] | (trained["averages"] if averaged else {})
        state = {"state_dict": {name: torch.full_like(tensor, 7) for name, tensor in wanted.items()}}
        dcp.load(state, checkpoint_id=str(checkpoint / ("ema_weights" if averaged else "weights")), no_dist=True)
        module = Model()
        load_weights(checkpoint, module, ema=averaged)
        for name, tensor in wanted.items():
            assert torch.equal(state["state_dict"][name], tensor)
            assert torch.equal(module.state_dict()[name], tensor)


@pytest.mark.parametrize("way", WAYS)
def test_without_its_optimizer_the_model_is_the_same(matrix, way, tmp_path):
    """One process leaves out the optimizer state of all ranks."""
    checkpoint = shutil.copytree(matrix / "saved" / way / f"step={STEPS}", tmp_path / f"step={STEPS}")
    thin(LocalDisk(), checkpoint)
    assert problems(checkpoint) == []
    wanted = torch.load(matrix / "state" / f"{way}.pt")["model"]
    state = {"state_dict": {name: torch.full_like(tensor, 7) for name, tensor in wanted.items()}}
    dcp.load(state, checkpoint_id=str(checkpoint / "weights"), no_dist=True)
    assert all(torch.equal(state["state_dict"][name], tensor) for name, tensor in wanted.items())
    assert not [key for key in described(checkpoint / "weights") if not key.startswith("state_dict.")]


@pytest.mark.parametrize("way", WAYS)
def test_of_a_run_that_keeps_one_optimizer_state_the_older_checkpoint_has_none(matrix, way):
    older, newer = (matrix / "saved" / way / f"step={step}" for step in (2, STEPS))
    thinned = way.partition("-")[0] in THINNED
    assert (read(older).has_optimizer, read(newer).has_optimizer) == (not thinned, True)
    assert problems(older) == []
    load_weights(older, Model())
    gone = {Path(file).name[2] for file in set(read(newer).files) - set(read(older).files)}
    assert gone == (set("0123"[: int(way[-1])]) if thinned else set())


@pytest.mark.parametrize(
    ("way", "name"), [("fsdp2-4", "blocks.0.weight"), ("tp2-4", "up.weight"), ("fsdp-2", "down.weight")]
)
@pytest.mark.parametrize("directory", ["weights", "ema_weights"])
def test_each_rank_writes_its_shard_once(matrix, way, name, directory):
    weights = matrix / "saved" / way / f"step={STEPS}" / directory
    metadata = dcp.FileSystemReader(weights).read_metadata()
    ranks: dict[str, set[str]] = {}
    for index, info in metadata.storage_data.items():
        ranks.setdefault(index.fqn, set()).add(info.relative_path[2])
    assert ranks[f"state_dict.{name}"] == set("0123"[: int(way[-1])])
    for key, tensor in metadata.state_dict_metadata.items():
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel(), key
