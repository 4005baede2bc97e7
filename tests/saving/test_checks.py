"""What is said of saves: ranks that do not fit together, a last one of averages."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging
from toy import ToyModel, loader, quiet_trainer

from nemologger import ModelCheckpoint
from nemologger.ranks import SingleProcess
from nemologger.saving.checks import check_lengths


class Several(SingleProcess):
    """Rank 0, which hears the others' values from a list."""

    others: list[float] = []

    def exchange(self, value, answer):
        return answer([value, *self.others])


@pytest.mark.parametrize(
    ("lengths", "said"),
    [([6, 6, 6], ""), ([float("inf")] * 2, ""), ([6, 7, 5], "5 batches on rank 2 and 7 on rank 1")],
)
def test_epochs_of_different_lengths_are_told(caplog, monkeypatch, lengths, said):
    trainer = SimpleNamespace(num_training_batches=lengths[0], is_global_zero=True)
    ranks = Several(world_size=len(lengths))
    monkeypatch.setattr(Several, "others", lengths[1:])
    check_lengths(ranks, trainer)
    assert (said in caplog.text) if said else not caplog.text


@pytest.mark.parametrize(("ckpt", "said"), [({"every_n_train_steps": 3}, True), ({"every_n_epochs": 1}, False)])
def test_a_last_checkpoint_that_holds_averages_is_told(ckpt, said, tmp_path, caplog):
    ckpt = ModelCheckpoint(dirpath=tmp_path, monitor=None, **ckpt)
    trainer = quiet_trainer(
        max_epochs=1, limit_train_batches=4, limit_val_batches=0, callbacks=[EMAWeightAveraging(), ckpt]
    )
    trainer.fit(ToyModel(), loader())
    assert ("when EMAWeightAveraging has put its averages" in caplog.text) is said
