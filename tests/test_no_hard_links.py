"""A file system without hard links: ``-last`` costs no second copy of all bytes."""

from __future__ import annotations

import errno
import os

import pytest
from toy import ToyModel, loader, names, quiet_trainer

from nemologger import AutoResume, ModelCheckpoint


@pytest.fixture
def refused(monkeypatch):
    """How often a hard link was asked for."""
    asked = []

    def link(source, target):
        asked.append(source)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    return asked


def train(directory, steps, *, beside=False):
    saves = ModelCheckpoint(
        dirpath=directory, filename="{step}", monitor=None, save_top_k=2, every_n_train_steps=2, async_save=beside
    )
    trainer = quiet_trainer(max_steps=steps, callbacks=[saves])
    model = ToyModel()
    AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer, model)
    trainer.fit(model, loader(), loader())
    return trainer


@pytest.mark.parametrize("beside", [False, True])
def test_last_is_a_link(tmp_path, refused, caplog, beside):
    train(tmp_path, 5, beside=beside)
    assert len(refused) == 1
    assert caplog.text.count("has no hard links: -last is a symbolic link") == 1
    assert names(tmp_path) == ["step=4", "step=5", "step=5-last"]
    assert (tmp_path / "step=5-last").resolve() == tmp_path / "step=5"
    assert train(tmp_path, 8, beside=beside).global_step == 8
    assert names(tmp_path) == ["step=6", "step=8", "step=8-last"]
    assert (tmp_path / "step=8-last").resolve() == tmp_path / "step=8"
