"""Checkpoints in an object store that hold more than one rank's whole tensors: shards, averages."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from helpers.sharded import differences
from processes import torchrun
from toy import ToyModel, loader, quiet_trainer

import nemologger as nl
from nemologger.callbacks import EMA, ExportModel
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.writing import in_flight
from nemologger.checkpoint.writing.async_saver import AsyncSaver
from nemologger.checkpoint.writing.staging import Staging
from nemologger.ranks import SingleProcess
from nemologger.stores.path import storage_path
from nemologger.stores.remote_disk import disk_of
from nemologger.stores.store import Store

SHARDED = Path(__file__).with_name("helpers") / "sharded_store.py"


def life(directory, steps, *others, options=None, **settings):
    """One life of a run that saves every two steps."""
    settings = {"filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1, "monitor": None, **settings}
    checkpoint = nl.ModelCheckpoint(dirpath=directory, storage_options=options, **settings)
    trainer = quiet_trainer(max_steps=steps, callbacks=[*others, checkpoint])
    nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
    model = ToyModel()
    trainer.fit(model, loader(), loader())
    return model


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key].cpu(), other[key].cpu()) for key in one)


@pytest.mark.parametrize("settings", [{}, {"async_save": True, "staging": "overlapped"}])
def test_averages(s3, tmp_path, monkeypatch, settings):
    """With credentials that only the callback has been given."""
    options = {"endpoint_url": s3.gate.endpoint, "key": "test", "secret": "test"}
    with monkeypatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        whole, rest = EMA(0.5), EMA(0.5)
        life(tmp_path, 6, whole)
        life(s3.url, 4, EMA(0.5), options=options, **settings)
        trained = life(s3.url, 6, rest, ExportModel("model", ".pt"), options=options, **settings)
        assert same(rest.averages, whole.averages)
        model = ToyModel()
        nl.load_weights(f"{s3.url}/step=6", model, ema=True, storage_options=options)
        assert same({name: value.detach() for name, value in model.named_parameters()}, whole.averages)
        nl.load_weights(f"{s3.url}/step=2", model, ema=True, storage_options=options)
        assert not same({name: value.detach() for name, value in model.named_parameters()}, whole.averages)
        nl.export_weights(f"{s3.url}/step=6", tmp_path / "averages.pt", ema=True, storage_options=options)
        assert nl.verify_checkpoint(f"{s3.url}/step=6/ema_weights", storage_options=options).ok
    assert same(torch.load(tmp_path / "averages.pt"), dict(trained.state_dict()) | whole.averages)
    nl.export_weights(f"{s3.url}/step=6", tmp_path / "weights.pt")
    assert same(torch.load(tmp_path / "weights.pt"), trained.state_dict())
    assert "model.pt" in s3.objects()


def test_the_thread_that_asks_the_store_leaves_staging_alone(s3, monkeypatch):
    """The hook of an optimizer is taken off by the thread that steps it."""
    finish, threads = Staging.finish, []

    def recorded(staging):
        threads.append(threading.current_thread())
        finish(staging)

    monkeypatch.setattr(Staging, "finish", recorded)
    life(s3.url, 5, async_save=True, staging="overlapped")
    assert {"step=2", "step=4", "step=5"} <= {path.name for path in storage_path(s3.url).iterdir()}
    assert set(threads) == {threading.main_thread()}


def test_a_long_upload_is_no_stalled_one(s3, monkeypatch):
    """An object is seen when it is complete, so that nothing seems to be written before; the writer says that it tries."""
    monkeypatch.setattr(in_flight, "TURN", 0.05)
    monkeypatch.setattr(in_flight, "STALLED", 5.0)
    s3.gate.rule = lambda request: "hold" if request.startswith("PUT") and "__0_0" in request else "pass"
    checkpoint = storage_path(f"{s3.url}/a")
    saver = AsyncSaver(disk_of(checkpoint), SingleProcess())
    snapshot = take({"state_dict": ToyModel().state_dict()})
    try:
        saver.prepare(snapshot)
        saver.start(snapshot, checkpoint, Manifest(step=1, epoch=0))
        go = threading.Timer(6.5, s3.gate.release)
        go.start()
        assert saver.finish() is not None
        go.join()
    finally:
        saver.close()
    assert problems(checkpoint) == []


def test_a_resume_reads_the_tensors_once(s3, monkeypatch):
    """They are verified and loaded in one pass."""
    life(s3.url, 2)
    read, asked = Store.read, []

    def counted(store, url, start=0, end=None):
        if url.endswith(".distcp"):
            asked.append((url.rpartition("/")[2], start))
        return read(store, url, start, end)

    monkeypatch.setattr(Store, "read", counted)
    life(s3.url, 3)
    assert sorted(asked) == [("__0_0.distcp", 0), ("__0_1.distcp", 0)]


@pytest.mark.dist
@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside"])
def test_a_sharded_model(s3, tmp_path, beside):
    """FSDP2 on two ranks: what it saved to a store it loads from there, and so does tensor parallelism."""
    torchrun(SHARDED, 2, tmp_path, s3.url, *["--beside"] * beside, timeout=500)
    state = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    assert state["two-steps"]["global_step"] == 2
    assert differences(state["resumed"], state["two-steps"]) == []
    assert differences(state["went-on"], state["three-steps"]) == []
    assert differences(state["tensor-parallel"], state["three-steps"]) == []
    assert "model: up.weight" in differences(state["two-steps"], state["three-steps"])
    written = s3.objects()
    assert {f"a/step=2/weights/__{rank}_0.distcp" for rank in (0, 1)} <= set(written)
    assert not [key for key in written if "unfinished" in key or "written-by" in key]
    for life in "abc":
        saved = list(storage_path(f"{s3.url}/{life}").iterdir())
        assert saved
        assert all(problems(path) == [] for path in saved)
