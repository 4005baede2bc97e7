"""FSDP2Strategy and modules that shard a part of themselves in their configure_model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import torchrun

SCRIPT = Path(__file__).with_name("helpers") / "partly_sharded.py"

pytestmark = pytest.mark.dist

REST = ["up.weight", "up.bias", "down.weight", "down.bias"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of two ranks saw."""
    directory = tmp_path_factory.mktemp("partly")
    torchrun(SCRIPT, 2, directory)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_what_a_module_that_shards_only_its_blocks_leaves_whole_is_the_same_on_all_ranks(seen):
    """Nobody would exchange the gradients of the rest. FSDP2 cannot shard numbers: they are named, nothing else."""
    one, other = (rank["ShardsBlocks"] for rank in seen)
    assert {name for name in one["sums"] if one["sums"][name] != other["sums"][name]} == {"scale"}
    assert one["whole"] == ["scale", "down.bias"]  # which is frozen
    assert one["said"][0].startswith("INFO: configure_model() of ShardsBlocks shards a part of it")
    assert one["said"][1].startswith("WARNING: configure_model() of ShardsBlocks leaves scale whole")


def test_a_module_that_exchanges_the_gradients_of_the_rest_itself_is_left_alone_and_told(seen):
    one, other = (rank["SyncsItself"] for rank in seen)
    assert one["sums"] == other["sums"]
    assert one["whole"] == ["scale", "up.weight", "up.bias", "down.weight", "down.bias"]
    assert len(one["said"]) == 1
    assert one["said"][0].startswith(
        "WARNING: configure_model() of SyncsItself leaves scale, up.weight, up.bias and 1 more"
    )


def test_a_hook_that_logs_gradients_does_not_keep_the_rest_whole(seen):
    """It averages nothing: each rank would train its own."""
    one, other = (rank["LogsGradients"] for rank in seen)
    assert {name for name in one["sums"] if one["sums"][name] != other["sums"][name]} == {"scale"}
    assert one["whole"] == ["scale", "down.bias"]


def test_a_step_of_the_modules_own_that_averages_gradients_is_left_alone(seen):
    one, other = (rank["StepsItself"] for rank in seen)
    assert one["sums"] == other["sums"]
    assert one["whole"] == ["scale", *REST]


def test_a_parameter_with_a_hook_keeps_it(seen):
    """FSDP2 would make another parameter of it, and the hook would never run."""
    one = seen[0]["HoldsStill"]
    assert one["whole"] == ["scale", "up.bias", "down.bias"]
    assert "leaves scale, up.bias whole" in one["said"][1]
    assert one["moved"]["up.bias"] == 0
