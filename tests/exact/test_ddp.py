from __future__ import annotations

import json
from pathlib import Path

import pytest
from exact.more_ranks import go_on
from exact.runs import BATCH, SAMPLES, Augmented, Case, train
from processes import torchrun
from torch.utils.data import DataLoader, DistributedSampler

SCRIPT = Path(__file__).with_name("ddp.py")


@pytest.mark.dist
@pytest.mark.parametrize(
    "names",
    [
        ["in order, epochs", "own sampler", "lazy sampler", "by hand", "metric of a callback"],
        ["stream", "stream beside", "workers"],
        ["FSDP2", "tensor parallel"],
    ],
)
def test_two_ranks(names, tmp_path):
    torchrun(SCRIPT, 2, tmp_path, *names)


@pytest.mark.dist
def test_four_ranks(tmp_path):
    torchrun(SCRIPT, 4, tmp_path, "shuffle", "workers")


@pytest.mark.dist
@pytest.mark.parametrize(("shuffle", "step"), [(False, 3), (True, 2)])
def test_on_another_number_of_ranks_training_goes_on_after_as_many_samples(shuffle, step, tmp_path, caplog):
    torchrun(SCRIPT, 2, tmp_path, "shuffle")
    seen = []

    class Noted(Augmented):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    case = Case(
        lambda: DataLoader(Noted(), batch_size=BATCH // 2, shuffle=shuffle), trainer={"limit_val_batches": 0}, steps=7
    )
    _, _, trainer = train(case, tmp_path / "one", 7, tmp_path / "shuffle" / "straight" / f"step={step}")
    assert (
        "the checkpoint was saved by 2 ranks, this run has 1 rank: training goes on after as many samples"
        in caplog.text
    )
    order = list(DistributedSampler(Noted(), 1, 0))  # Lightning shuffles on several ranks, whatever the loader says
    before, after = 2 * step, 7 - step  # batches of two samples on two ranks, and on one
    assert seen == order[2 * before : 2 * (before + after)]
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == before + after


@pytest.mark.dist
def test_more_ranks_go_on_in_the_order_of_one(tmp_path):
    first = go_on(tmp_path / "one", None, max_steps=3)
    torchrun(SCRIPT.with_name("more_ranks.py"), 2, tmp_path, tmp_path / "one" / "step=3")
    ranks = [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in (0, 1)]
    assert ranks[0][:6] == ranks[1][:6] == first  # what a dataset has noted goes on
    assert sorted(first[:4] + ranks[0][6:] + ranks[1][6:]) == list(range(SAMPLES))
    said = [line for line in (tmp_path / "log-0").read_text().splitlines() if "saved by 1 rank, this run has 2" in line]
    assert len(said) == 1
    assert "; 1 of its batches, which 2 ranks cannot share evenly, are trained on once more" in said[0]
