"""Models of all kinds under FSDP2, and what users do with their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import torchrun
from toy import ToyModel

from nemologger import load_weights
from nemologger.io import load_context

SCRIPT = Path(__file__).with_name("helpers") / "sharded_models.py"

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where two ranks have been through all scenarios."""
    directory = tmp_path_factory.mktemp("models")
    torchrun(SCRIPT, 2, directory)
    return directory


@pytest.fixture(scope="module")
def seen(directory) -> list[dict]:
    """What each of them saw."""
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "how",
    [
        "ours, FSDP2",
        "ours, own configure_model",
        "ours, FSDP",
        "a file, FSDP2",
        "a file, own configure_model",
    ],
)
def test_a_new_run_begins_with_the_weights_and_optimizer_state_of_another(seen, how):
    assert [rank["trained"] for rank in seen] == [33, 33]
    assert [rank[f"restore {how}"] for rank in seen] == [[], []]


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("tied", ["blocks.1"]),  # the other one has a parameter in common with the head
        ("repeated", ["blocks.0", "blocks.2"]),
        ("nested", ["blocks.0", "blocks.1"]),
        ("lists", ["blocks.0.0", "blocks.1.0"]),
    ],
)
def test_blocks_are_sharded_by_themselves_where_that_is_possible(seen, kind, blocks):
    for rank in seen:
        assert rank[kind] == {"differences": [], "sharded": ["", *blocks], "tied": True if kind == "tied" else None}


def test_the_context_and_the_name_are_those_of_the_module_as_it_was_written(seen, directory):
    assert [rank["toy"] for rank in seen] == [None, None]
    path = directory / "toy" / "ToyModel"
    model = load_context(path, subpath="model")
    assert type(model) is ToyModel
    assert model.hparams.width == 7
    load_weights(path, model)


def test_an_exception_of_all_ranks_is_saved_in_full_with_async_save_too(seen):
    assert [rank["stopped"] for rank in seen] == [["step=2", "step=3"]] * 2


def test_a_context_that_rank_0_cannot_write_fails_the_save_on_both_and_only_that_one(seen):
    for rank in seen:
        first, *others = rank["context"]
        assert first.startswith("SaveFailedError")
        assert "TypeError: not this context" in first
        assert others == ["True", "[1.0]"]


def test_the_step_of_a_scalar_parameter_stays_a_plain_number(seen):
    assert [rank["scalar"] for rank in seen] == [["DTensor", "DTensor", "Tensor"]] * 2


def test_parameters_without_names_are_refused_before_training(seen, directory):
    """They could be saved, and nobody could go on from that."""
    for rank in seen:
        assert rank["flat"].startswith("ConfigurationError: FSDPStrategy(use_orig_params=False)")
    assert not list(directory.glob("flat/*"))


def test_gradients_are_clipped_by_their_norm_over_split_and_whole_layers(seen):
    assert max(rank["clipped"] for rank in seen) < 1e-6


@pytest.mark.parametrize("strategy", ["FSDP2Strategy", "FSDPOnCPU", "ModelParallelStrategy"])
def test_a_sharded_model_writes_the_best_checkpoint_and_is_left_as_it_was(seen, strategy):
    for rank in seen:
        assert rank[f"export {strategy}"] == {"file": [], "memory": [], "trained on": 9}
