"""What runs beside training waits for other ranks at least as long as training does."""

from __future__ import annotations

from datetime import timedelta

import pytest
from toy import Scored, ToyDataModule, quiet_trainer

import nemologger as nl
from nemologger import lightning_port
from nemologger.callbacks import ExportModel, MaxTimePerRun, PreemptionCallback, StragglerDetection, stop_at_boundary
from nemologger.ranks import SingleProcess


@pytest.mark.parametrize(
    "make",
    [PreemptionCallback, lambda: MaxTimePerRun({"hours": 1}), StragglerDetection, lambda: ExportModel("m", ".pt")],
)
@pytest.mark.parametrize(
    ("strategys", "waited"),
    [(timedelta(hours=2), timedelta(hours=2)), (timedelta(seconds=5), timedelta(minutes=10))],
)
def test_a_callback_waits_as_long_as_training(make, strategys, waited, tmp_path, monkeypatch):
    given = []

    def connect(timeout=None):
        given.append(timeout)
        return SingleProcess()

    monkeypatch.setattr(lightning_port.processes, "connect", connect)
    ckpt = nl.ModelCheckpoint(dirpath=tmp_path, save_on_sigterm=False, monitor=None)
    trainer = quiet_trainer(max_steps=1, callbacks=[make(), ckpt])
    trainer.strategy._timeout = strategys
    trainer.fit(Scored(scores=[1.0]), datamodule=ToyDataModule())
    assert given == [waited]


def test_what_it_is_told_counts_for_more(tmp_path, monkeypatch):
    given = []

    def connect(timeout):
        given.append(timeout)
        return SingleProcess()

    monkeypatch.setattr(stop_at_boundary, "connect", connect)
    trainer = quiet_trainer(
        max_steps=1, callbacks=[PreemptionCallback(rank_timeout=timedelta(seconds=7))], enable_checkpointing=False
    )
    trainer.fit(Scored(scores=[1.0]), datamodule=ToyDataModule())
    assert given == [timedelta(seconds=7)]
