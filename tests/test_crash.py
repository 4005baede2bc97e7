"""The power fails at any moment of a run that saves beside training."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.crash import check_resumable, crashes, materialize
from helpers.disks import RecordingDisk
from lightning.pytorch.loggers import CSVLogger
from toy import ToyModel, loader, quiet_trainer

from nemologger import ModelCheckpoint
from nemologger.checkpoint.writing import equipment, writer_main


class Publishes(CSVLogger):
    """Puts down, between the operations of the disk, which step a user has been told is safe."""

    def __init__(self, directory: Path, disk: RecordingDisk) -> None:
        super().__init__(directory)
        self.disk = disk

    def after_save_checkpoint(self, checkpoint_callback):
        self.disk.note(max(kept.step for kept in checkpoint_callback.shelf.kept))


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> tuple[Path, RecordingDisk]:
    """A whole fit. What the writer process does is done by the same code here, where it can be seen."""
    disk = RecordingDisk()
    monkeypatch.setattr(writer_main, "LocalDisk", lambda: disk)

    class WriterHere:
        busy, alive, pid = False, True, 0

        def __init__(self, arena, always):
            self.arena, self.always = arena, always

        def begins(self, timeout):
            return True

        def stand_by(self):
            pass

        def submit(self, job):
            self.job = job

        def outcome(self, timeout=0.0):
            return writer_main.perform(self.job, self.arena.memory, self.always)

        def close(self):
            pass

    monkeypatch.setattr(equipment, "Writer", WriterHere)
    run = tmp_path / "run"
    run.mkdir()
    saves = ModelCheckpoint(
        dirpath=run, filename="{step}", monitor="val_loss", mode="max", save_top_k=2, every_n_train_steps=2,
        async_save=True, save_last_n_optim_states=1, disk=disk, verbose=False,
    )  # fmt: skip
    logger = Publishes(tmp_path / "logs", disk)
    trainer = quiet_trainer(max_steps=10, val_check_interval=2, callbacks=[saves], logger=logger)
    trainer.fit(ToyModel(), loader(), loader())
    return run, disk


def test_after_any_operation_the_newest_that_was_published_is_there(recorded, tmp_path):
    run, disk = recorded
    operations = [one for one in disk.operations if one[0] == "note" or one[1].is_relative_to(run)]
    count = published = 0
    for published, state, when in crashes(run, operations):
        count += 1
        materialize(state, tmp_path / f"crash{count}")
        check_resumable(tmp_path / f"crash{count}", published, when)
    assert count > 100
    assert published == 10
