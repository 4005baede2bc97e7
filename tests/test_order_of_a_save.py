"""Commit, links, removal, and only then the trackers: whoever is told of a checkpoint finds the directory as it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.disks import RecordingDisk
from lightning.pytorch.loggers.logger import DummyLogger
from toy import ToyModel, loader, names, quiet_trainer

from nemologger import ModelCheckpoint


class _Told(DummyLogger):
    """Puts down when it is told of a checkpoint, between the operations of the disk."""

    def __init__(self, disk: RecordingDisk, directory: Path) -> None:
        super().__init__()
        self.disk, self.directory = disk, directory

    def after_save_checkpoint(self, checkpoint_callback) -> None:
        self.disk.note("told", sorted(path.parent.name for path in self.directory.glob("*/manifest.json")))


def events(disk: RecordingDisk) -> list[str]:
    """What counts of the operations: a manifest or a link that appears, one that goes, a logger that is told."""
    found, links = [], set()
    for method, *arguments in disk.operations:
        if method == "note":
            found.append(f"told of {', '.join(arguments[1])}")
        elif method == "symlink":
            links.add(arguments[0])
            found.append(f"+ {arguments[0].name}")
        elif method in ("write", "remove") and arguments[0].name == "manifest.json":
            found.append(f"{'+' if method == 'write' else '-'} {arguments[0].parent.name}")
        elif method == "remove" and arguments[0] in links:
            found.append(f"- {arguments[0].name}")
    return found


@pytest.mark.parametrize("last", [True, "link"])
@pytest.mark.parametrize("beside", [False, True], ids=["sync", "async"])
def test_a_tracker_is_told_last(tmp_path, last, beside):
    disk = RecordingDisk()
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=1, save_last=last,
        async_save=beside, disk=disk,
    )  # fmt: skip
    quiet_trainer(max_steps=5, callbacks=[ckpt], logger=_Told(disk, tmp_path)).fit(ToyModel(), loader())
    seen = events(disk)
    for step, before in ((2, None), (4, 2), (5, 4)):
        saved, seen = seen[: 3 if before is None else 5], seen[3 if before is None else 5 :]
        assert saved[:2] == [f"+ step={step}", f"+ step={step}-last"]
        assert set(saved[2:-1]) == ({f"- step={before}", f"- step={before}-last"} if before else set())
        assert saved[-1] == f"told of step={step}, step={step}-last"
    assert seen == []
    assert names(tmp_path) == ["step=5", "step=5-last"]
