"""Averages of weights that two ranks share: each rank keeps its part, and together they are what the formula says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.sharded_averages import DECAY, Watched, loader
from processes import torchrun
from toy import quiet_trainer

from nemologger.callbacks import EMA

SCRIPT = Path(__file__).with_name("helpers") / "sharded_averages.py"
ELEMENTS = sum(parameter.numel() for parameter in Watched().parameters())
FSDP2 = ["fsdp2", "fsdp2, offloaded", "fsdp2, bf16"]
FSDP = ["fsdp", "fsdp, offloaded"]
RUNS = [*FSDP2, "tp2", *FSDP, "fsdp, not sharded"]

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of two ranks saw; one process left them a checkpoint file of Lightning's."""
    directory = tmp_path_factory.mktemp("averages")
    alone = quiet_trainer(max_steps=4, callbacks=[EMA(DECAY)], limit_val_batches=0, enable_checkpointing=False)
    alone.fit(Watched(), loader())
    alone.save_checkpoint(directory / "one.ckpt", weights_only=False)
    torchrun(SCRIPT, 2, directory)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("run", RUNS)
def test_they_are_the_formula_to_the_bit(seen, run):
    for rank in seen:
        assert rank[run]["formula"] == []
        assert rank[run]["not moved"] == []


@pytest.mark.parametrize("run", [*FSDP2, "tp2", *FSDP])
def test_each_rank_keeps_its_part_alone(seen, run):
    here = [rank[run]["here"] for rank in seen]
    if run == "tp2":  # the blocks are not split
        assert max(here) < ELEMENTS
    else:
        assert sum(here) == ELEMENTS
        assert min(here) > ELEMENTS // 3
    assert len(seen[0][run]["sharded"]) == (0 if run in FSDP else 8)


@pytest.mark.parametrize("run", RUNS)
def test_validation_and_test_see_them_and_training_does_not_notice(seen, run):
    """Neither uses what was gathered of the parameters for the other."""
    close = 1e-6 if run == "tp2" else 0  # sums in another order
    for rank in (rank[run] for rank in seen):
        assert rank["validation"] <= close
        assert rank["tested"] <= close
        assert rank["not as trained"] > 0.01
        assert rank["training"] == []
        assert rank["losses"]
        if run in (*FSDP2, "tp2"):
            assert rank["test"] <= close
            assert rank["weights after test"] == []


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_has_them_beside_the_weights_and_a_run_goes_on_from_it(seen, run):
    for rank in (rank[run] for rank in seen):
        assert rank["saved"] == [[], [], []]
        assert rank["resumed"] == []
        assert rank["resumed training"] == []


def test_a_checkpoint_of_weights_alone_has_them(seen):
    assert [rank["weights only"] for rank in seen] == [[], []]


def test_the_weights_are_back_and_saved_when_validation_raises(seen):
    assert [rank["stopped"] for rank in seen] == [[], []]


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp"])
def test_lightnings_own_checkpoint_has_what_is_trained_and_says_that_it_has_no_averages(seen, kind):
    for rank, said in zip(seen, (1, 0), strict=True):
        assert rank[f"lightning {kind}"]["wrong"] == []
        assert not rank[f"lightning {kind}"]["averages"]
        assert len(rank[f"lightning {kind}"]["said"]) == said
    assert "holds no averages: have nemologger.ModelCheckpoint save it" in seen[0][f"lightning {kind}"]["said"][0]


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp"])
def test_a_file_of_one_process_is_gone_on_from(seen, kind):
    assert [rank[f"file {kind}"] for rank in seen] == [[], []]


def test_nemo_1s_section_asks_for_them(seen):
    assert [rank["managed"] for rank in seen] == [[], []]


@pytest.mark.parametrize(("kind", "why"), [("flat", "use_orig_params=False"), ("half", "less than 32 bits")])
def test_what_fsdp_cannot_shard_is_refused(seen, kind, why):
    for rank in seen:
        assert rank[kind].startswith("ConfigurationError: EMA does not work with FSDPStrategy and")
        assert why in rank[kind]
        assert rank[kind].endswith("Use nemologger's FSDP2Strategy.")
