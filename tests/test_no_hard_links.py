"""A file system without hard links: ``-last`` costs no second copy of all bytes, unless there are no links at all."""

from __future__ import annotations

import errno
import os

import pytest
from helpers.disks import full
from toy import ToyModel, loader, names, quiet_trainer

from nemologger import AutoResume, ModelCheckpoint, verify_checkpoint
from nemologger.disk import LocalDisk


@pytest.fixture
def refused(monkeypatch):
    """How often a hard link was asked for."""
    return refuse(monkeypatch, "link", errno.EXDEV)


def refuse(monkeypatch, function, code):
    """Have the file system refuse such links. How often one was asked for."""
    asked = []

    def link(source, target, *more):
        asked.append(source)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, link)
    return asked


def train(directory, steps, **options):
    options = {"save_top_k": 2, **options}
    saves = ModelCheckpoint(dirpath=directory, filename="{step}", monitor=None, every_n_train_steps=2, **options)
    trainer = quiet_trainer(max_steps=steps, callbacks=[saves])
    model = ToyModel()
    AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer, model)
    trainer.fit(model, loader(), loader())
    return trainer


@pytest.mark.parametrize("beside", [False, True])
def test_last_is_a_link(tmp_path, refused, caplog, beside):
    train(tmp_path, 5, async_save=beside)
    assert len(refused) == 1
    assert caplog.text.count("has no hard links: -last is a symbolic link") == 1
    assert names(tmp_path) == ["step=4", "step=5", "step=5-last"]
    assert (tmp_path / "step=5-last").resolve() == tmp_path / "step=5"
    assert train(tmp_path, 8, async_save=beside).global_step == 8
    assert names(tmp_path) == ["step=6", "step=8", "step=8-last"]
    assert (tmp_path / "step=8-last").resolve() == tmp_path / "step=8"


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("save_last", [True, "link"])
def test_last_is_a_copy_where_there_are_no_links_at_all(tmp_path, monkeypatch, caplog, save_last, beside):
    """exFAT answers EPERM to both, other mounts EIO."""
    for function in ("link", "symlink"):
        refuse(monkeypatch, function, errno.EIO)
    train(tmp_path, 5, save_last=save_last, async_save=beside)
    assert "in a row that may fail" not in caplog.text
    assert caplog.text.count("has neither hard nor symbolic links: -last is a copy") == 1
    assert names(tmp_path) == ["step=4", "step=5", "step=5-last"]
    assert not (tmp_path / "step=5-last").is_symlink()
    (tmp_path / "step=5" / "weights" / "common.pt").unlink()
    assert verify_checkpoint(tmp_path / "step=5-last").ok  # it stands by itself
    assert train(tmp_path, 8, save_last=save_last, async_save=beside).global_step == 8
    assert names(tmp_path) == ["step=6", "step=8", "step=8-last"]


def test_last_shares_its_files_where_only_symbolic_links_are_missing(tmp_path, monkeypatch, caplog):
    refuse(monkeypatch, "symlink", errno.EPERM)
    train(tmp_path, 4, save_last="link", save_top_k=1)
    assert "has no symbolic links: -last shares its files through hard links" in caplog.text
    assert names(tmp_path) == ["step=4", "step=4-last"]
    assert os.path.samefile(*(tmp_path / name / "weights" / "common.pt" for name in names(tmp_path)))


class FullAtFirst(LocalDisk):
    """Has room for no link of either kind until a copy has failed as well."""

    is_full = True

    def can_symlink(self, path, points_to):
        return not self.is_full and super().can_symlink(path, points_to)

    def link(self, source, target):
        if self.is_full:
            self.is_full = False
            raise full()
        super().link(source, target)


def test_a_disk_that_was_full_at_the_first_save_is_asked_again_for_links(tmp_path, refused, caplog):
    train(tmp_path, 4, disk=FullAtFirst())
    (failed,) = (message for message in caplog.messages if "in a row that may fail" in message)
    assert "step=2-last was not made from" in failed
    assert failed.endswith(f"the newest checkpoint is {tmp_path / 'step=2'}.")
    assert names(tmp_path) == ["step=2", "step=4", "step=4-last"]
    assert (tmp_path / "step=4-last").resolve() == tmp_path / "step=4"
