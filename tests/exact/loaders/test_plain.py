from __future__ import annotations

import pytest
from exact.runs import BATCH, Augmented, Case, check, check_chain, shuffled
from torch.utils.data import DataLoader

CASES = {
    "shuffle": Case(shuffled),
    "in order": Case(lambda: DataLoader(Augmented(), batch_size=BATCH)),
    "epochs": Case(
        shuffled, trainer={"max_epochs": 3, "max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_step(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chain(case, tmp_path):
    check_chain(case, tmp_path)
