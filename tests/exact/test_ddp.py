from __future__ import annotations

from pathlib import Path

import pytest
from exact.runs import BATCH, Augmented, Case, train
from processes import torchrun
from torch.utils.data import DataLoader

SCRIPT = Path(__file__).with_name("ddp.py")


@pytest.mark.dist
@pytest.mark.parametrize(
    "names",
    [
        ["in order, epochs", "own sampler", "lazy sampler", "by hand"],
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
def test_on_another_number_of_ranks_training_goes_on_after_as_many_samples(tmp_path, caplog):
    torchrun(SCRIPT, 2, tmp_path, "shuffle")
    seen = []

    class Noted(Augmented):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    case = Case(lambda: DataLoader(Noted(), batch_size=BATCH // 2), trainer={"limit_val_batches": 0}, steps=7)
    _, _, trainer = train(case, tmp_path / "one", 7, tmp_path / "shuffle" / "straight" / "step=3")
    assert "the checkpoint is of 2 ranks, of which 2 read data; there are 1 now" in caplog.text
    assert seen == list(range(12, 20))  # three batches of two samples on two ranks were twelve samples
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == 10
