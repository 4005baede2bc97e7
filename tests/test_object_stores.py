"""Checkpoints in object stores: all that ModelCheckpoint and AutoResume promise, against a real S3 server."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.stored_run import At, life, names_in
from processes import kill, python, started, torchrun, wait_for
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from toy import ToyModel, loader, losses_of, quiet_trainer
from toy import names as local_names

import nemologger as nl
from nemologger.checkpoint.find import Status, survey
from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.verify import problems
from nemologger.stores import store
from nemologger.stores.path import storage_path
from nemologger.stores.remote_disk import disk_of
from nemologger.verify import main as verify_main

SCRIPT = Path(__file__).with_name("train_toy.py")


@pytest.fixture(params=["s3", "memory"])
def url(request):
    """An empty directory in a store."""
    if request.param == "s3":
        yield request.getfixturevalue("s3").url
    else:
        yield "memory://bucket/runs"
        path = storage_path("memory://bucket")
        disk_of(path).remove(path)


@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside"])
def test_a_resumed_run_has_the_same_losses_and_keeps_the_same(s3, tmp_path, beside):
    _, straight = life(tmp_path / "local", 20)
    for steps in (8, 20):
        checkpoint, model = life(s3.url, steps, async_save=beside)
    assert sorted(model.losses) == list(range(8, 20))
    assert all(straight.losses[step] == loss for step, loss in model.losses.items())
    assert names_in(s3.url) == local_names(tmp_path / "local") == ["step=15", "step=20", "step=20-last"]
    assert checkpoint.best_model_path == f"{s3.url}/step=20"
    assert checkpoint.last_model_path == f"{s3.url}/step=20-last"
    assert s3.objects().count("step=20-last.link") == 1
    assert s3.pending() == []
    for path in storage_path(s3.url).iterdir():
        assert nl.verify_checkpoint(path).ok
        assert torch.equal(load_checkpoint(path)["state_dict"]["net.0.weight"], model.net[0].weight) == (
            path.name != "step=15"
        )


def test_what_many_checkpoints_cost(s3, monkeypatch):
    """A save as much as the first ones did, and a start one request more for each of them."""
    opened, open_one, requests = [], store.open_file_system, []

    def counted(*arguments):
        opened.append(arguments)
        return open_one(*arguments)

    def count(trainer, *args):
        requests.append(len(s3.gate.requests))

    monkeypatch.setattr(store, "open_file_system", counted)
    watch = pl.Callback()
    watch.on_train_batch_start = count
    every_step = {"every_n_train_steps": 1, "save_top_k": -1, "monitor": None}
    life(s3.url, 8, others=[watch], **every_step)
    assert len({later - earlier for earlier, later in pairwise(requests[2:])}) == 1
    assert len(opened) <= 3, "the search for checkpoints, and the callback"

    s3.gate.requests.clear()
    life(s3.url, 8, **every_step)
    assert [request.split()[0] for request in s3.gate.requests if "/step%3D3" in request] == ["GET"] * 2
    assert len([request for request in s3.gate.requests if "-last.link" in request]) < 10, "the link is followed once"
    assert len(s3.gate.requests) < 90


@pytest.mark.parametrize("last", [True, "link", False])
@pytest.mark.parametrize("top_k", [0, 1, -1])
def test_what_is_kept_is_what_is_kept_on_a_disk(tmp_path, last, top_k):
    """Whatever the score: the losses fall, so with mode="max" the first is the best and -last stands by itself."""
    url = "memory://bucket/kept"
    try:
        for where in (url, tmp_path):
            life(where, 12, mode="max", save_last=last, save_top_k=top_k)
            life(where, 20, mode="max", save_last=last, save_top_k=top_k)
        if last == "link":  # on a disk the newest stands under its own name and is pointed to; so can a store's
            assert {"step=20-last"} <= set(names_in(url)) <= set(local_names(tmp_path))
        else:
            assert names_in(url) == local_names(tmp_path)
        newest = max((f for f in survey(storage_path(url)) if f.manifest), key=lambda f: f.manifest.order, default=None)
        if last:
            assert newest.manifest.step == 20
        assert all(
            found.status is Status.COMPLETE and problems(found.path) == [] for found in survey(storage_path(url))
        )
    finally:
        path = storage_path(url)
        disk_of(path).remove(path)


def test_a_name_that_is_taken_is_replaced_only_when_its_successor_is_there(url, monkeypatch):
    """Nothing is renamed, and at no moment is nothing there."""
    seen, root, write = [], storage_path(url), store.Store.write

    def watching(self, where, parts, **options):
        if "/weights/" in where:
            seen.append([found.manifest.step for found in survey(root) if found.manifest])
        write(self, where, parts, **options)

    monkeypatch.setattr(store.Store, "write", watching)
    life(url, 15, filename="best", save_top_k=1)
    assert len(seen) == 15
    assert all(seen[5:]), "from the second save on there is always one"
    monkeypatch.undo()
    assert [name.removesuffix("-last") for name in names_in(url)] in (["best", "best"], ["best-v1", "best"])
    assert [f.manifest.step for f in survey(root) if f.manifest] == [15, 15]
    assert all(problems(found.path) == [] for found in survey(root))


def test_the_final_checkpoint_may_differ_from_the_one_of_its_step(url):
    life(url, 5, save_optim_on_train_end=False)
    assert names_in(url) == ["step=5", "step=5-last"]
    root = storage_path(url)
    assert not (root / "step=5-last").is_symlink()
    assert "optimizer_states" in load_checkpoint(root / "step=5")
    assert "optimizer_states" not in load_checkpoint(root / "step=5-last")


def test_a_flipped_byte_is_found_and_the_one_before_is_used(s3, caplog, capsys):
    life(s3.url, 10)
    s3.flip("step=10/weights/__0_0.distcp", -100)
    found = nl.verify_checkpoint(f"{s3.url}/step=10")
    assert [problem.file for problem in found.problems] == ["weights/__0_0.distcp"]
    assert nl.verify_checkpoint(f"{s3.url}/step=10", deep=False).ok
    assert verify_main([s3.url]) == 1
    assert "have changed since they were written" in capsys.readouterr().out
    with pytest.raises(nl.DamagedCheckpointError, match="have changed since they were written"):
        load_checkpoint(storage_path(f"{s3.url}/step=10"))
    trainer = quiet_trainer(max_steps=20)
    with caplog.at_level(logging.ERROR):
        resumed = nl.AutoResume(resume_from_directory=s3.url).setup(trainer)
    assert str(resumed.path) == f"{s3.url}/step=5"
    assert "step=10-last is passed over: damaged" in caplog.text
    s3.client.delete_object(Bucket=s3.name, Key="runs/step=5/weights/common.pt")
    with pytest.raises(nl.DamagedCheckpointError, match=r"common\.pt: is missing"):
        nl.AutoResume(resume_from_path=f"{s3.url}/step=5").setup(trainer)


def test_an_upload_without_a_marker_is_dropped_by_the_next_run(s3):
    """A rank that hangs may begin one when the others have given up the save, and is killed then. Its parts cost money."""
    for key in ("step=7/weights/__1_0.distcp", "step=7/context/tokens", "data.bin", "data/weights/of/others"):
        s3.client.create_multipart_upload(Bucket=s3.name, Key=f"runs/{key}")
    names_in(s3.url)  # a reader drops nothing
    assert len(s3.pending()) == 4
    life(s3.url, 5)
    assert s3.pending() == ["runs/data.bin", "runs/data/weights/of/others"]


def test_a_listing_that_is_old(s3, monkeypatch):
    """What it does not show yet is asked for by name."""
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "below", lambda self, url: {})
        life(s3.url, 5, resume=False)
    assert names_in(s3.url) == ["step=5", "step=5-last"]
    (found,) = [one for one in survey(storage_path(s3.url)) if one.path.name == "step=5"]
    assert "context/io.json" in found.manifest.files
    assert problems(found.path) == []


def test_an_object_with_the_name_of_the_directory(s3):
    """As some tools make to mark it: what is below is seen all the same."""
    s3.client.put_object(Bucket=s3.name, Key="runs", Body=b"")
    life(s3.url, 5)
    _, model = life(s3.url, 8)
    assert sorted(model.losses) == [5, 6, 7]
    assert storage_path(s3.url).is_dir()
    assert not storage_path(f"{s3.url}/step=5/manifest.json").is_dir()


def test_weights_go_where_they_are_wanted(s3, tmp_path):
    _, trained = life(s3.url, 5)
    wanted = trained.state_dict()
    for where in ("step=5", "step=5-last", "step=5/weights"):
        model = ToyModel()
        nl.load_weights(f"{s3.url}/{where}", model)
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    built = nl.load_model(f"{s3.url}/step=5")
    assert all(torch.equal(value, wanted[key]) for key, value in built.state_dict().items())
    nl.export_weights(f"{s3.url}/step=5", tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt")["net.0.weight"], wanted["net.0.weight"])
    nl.export_weights(f"{s3.url}/step=5", f"{s3.url}/model.pt")
    assert "model.pt" in s3.objects()
    with pytest.raises(nl.NotFoundError, match=r"step=6"):
        nl.load_weights(f"{s3.url}/step=6", ToyModel())
    # torch's own reader, with nothing of ours
    state = {"state_dict": {"net.0.weight": torch.zeros(8, 8)}}
    dcp.load(state, storage_reader=FsspecReader(f"{s3.url}/step=5/weights"), no_dist=True)
    assert torch.equal(state["state_dict"]["net.0.weight"], wanted["net.0.weight"])


def test_a_new_run_takes_its_weights_from_a_store(s3, tmp_path):
    _, trained = life(s3.url, 5)
    trainer = quiet_trainer(max_steps=1, callbacks=[nl.ModelCheckpoint(dirpath=tmp_path, monitor=None)])
    restore = nl.RestoreConfig(path=s3.url, load_optim_state=True)
    found = nl.AutoResume(restore_config=restore, resume_if_exists=True).setup(trainer)
    assert found.weights_from == storage_path(f"{s3.url}/step=5")
    model = ToyModel()
    start = {}
    trainer.callbacks.append(At({0: lambda: start.update({k: v.clone() for k, v in model.state_dict().items()})}))
    trainer.fit(model, loader(), loader())
    assert torch.equal(start["net.0.weight"], trained.net[0].weight)


def test_what_torch_wrote_to_a_store_is_read(s3):
    state = {"state_dict": {"net.0.weight": torch.arange(64.0).reshape(8, 8), "x": torch.arange(5)}}
    with pytest.warns(UserWarning, match="torch.distributed is"):
        dcp.save(state, storage_writer=dcp.filesystem.FileSystemWriter("there"), no_dist=True)
    root = storage_path(s3.url)
    for file in Path("there").iterdir():
        disk_of(root).write(root / "weights" / file.name, [file.read_bytes()])
    disk_of(root).write(root / "weights" / "common.pt", [_saved({})])
    loaded = load_checkpoint(root)["state_dict"]
    assert torch.equal(loaded["net.0.weight"], state["state_dict"]["net.0.weight"])
    assert torch.equal(loaded["x"], torch.arange(5))


def _saved(value) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# --- processes --------------------------------------------------------------------------------------------------------

LARGE = ("--width", 480_000, "--files", 1)  # one file of about 75 MB: it goes up in parts


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The losses of a run of six steps that nobody stopped."""
    directory = tmp_path_factory.mktemp("straight")
    python(SCRIPT, directory, 6, "--every", 2, *LARGE)
    return losses_of(directory)


@pytest.mark.dist
@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside"])
def test_a_kill_in_mid_upload(s3, tmp_path, straight, beside):
    """The one before is the newest, and the next run removes what is left over, even if the writer goes on for a while."""
    options = ("--every", 2, "--dirpath", s3.url, *LARGE, *["--beside"] * beside)

    def is_in_the_middle(request: str) -> bool:
        return "partNumber=3" in request and "step%3D4" in request

    s3.gate.rule = lambda request: "hold" if is_in_the_middle(request) else "pass"
    with started(SCRIPT, tmp_path / "killed", 6, *options) as process:
        wait_for(lambda: any(map(is_in_the_middle, s3.gate.requests)), timeout=120)
        time.sleep(1)
        kill(process)
    found = survey(storage_path(s3.url))
    (unfinished,) = [path.name.removesuffix("-unfinished") for path in storage_path(s3.url).glob("*-unfinished")]
    assert unfinished in ("step=4", "step=4-last")
    assert {one.path.name for one in found if one.status is Status.UNFINISHED} <= {unfinished}
    whole = [one for one in found if one.status is Status.COMPLETE]
    assert {one.manifest.step for one in whole} == {2}
    assert all(problems(one.path) == [] for one in whole)
    assert s3.pending() == [f"runs/{unfinished}/weights/__0_0.distcp"]  # a reader removes nothing

    s3.gate.rule = lambda request: "pass"
    python(SCRIPT, tmp_path / "killed", 6, *options)
    log = (tmp_path / "killed" / "toy" / "nemo_log_globalrank-0_localrank-0.txt").read_text()
    assert f"{unfinished} was never finished, or was being removed: removed" in log
    assert "resuming from" in log
    s3.gate.release()  # what is left of the writer of the killed run goes on only now
    wait_for(lambda: not _writers_beside())
    assert s3.pending() == []
    found = survey(storage_path(s3.url))
    assert {one.manifest.step for one in found} >= {6}
    assert all(problems(one.path) == [] for one in found)
    assert losses_of(tmp_path / "killed") == straight


def _writers_beside() -> list[str]:
    """Writer processes whose training process is gone, of this test's bucket."""
    url = os.environ["AWS_ENDPOINT_URL"].encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_writer = b"writer_main" in (process / "cmdline").read_bytes()
            if is_writer and url in (process / "environ").read_bytes():
                found.append(process.name)
    return found


@pytest.mark.dist
def test_two_ranks(s3, tmp_path):
    """One life waits for its saves, the next one saves beside training."""
    options = ("--every", 2, "--devices", 2)
    torchrun(SCRIPT, 2, tmp_path / "straight", 8, *options)
    torchrun(SCRIPT, 2, tmp_path / "store", 4, *options, "--dirpath", s3.url)
    torchrun(SCRIPT, 2, tmp_path / "store", 8, *options, "--dirpath", s3.url, "--beside", "--pause", 0.1)
    assert names_in(s3.url) == local_names(tmp_path / "straight" / "toy" / "checkpoints")
    assert "step=8/weights/__1_0.distcp" in s3.objects()
    assert not [key for key in s3.objects() if "unfinished" in key or "written-by" in key]
    assert all(problems(path) == [] for path in storage_path(s3.url).iterdir())
    for rank in (0, 1):
        one, other = ((tmp_path / run / f"losses-{rank}.txt").read_text() for run in ("straight", "store"))
        assert one == other


def test_of_two_runs_in_one_directory_the_older_one_saves_no_more(s3, tmp_path):
    """A store has no locks. What the newer one has saved stays as it is, also when that has ended."""
    newer = []

    def start():
        newer.append(python(SCRIPT, tmp_path, 10, "--dirpath", s3.url, timeout=100))
        newer.extend((name, s3.objects()) for name in [names_in(s3.url)])

    with pytest.raises(
        nl.SaveFailedError, match=rf"another run has had {s3.url} since this one began \(process \d+ on"
    ):
        life(s3.url, 40, others=[At({7: start})])
    _, (names, objects) = newer
    assert names == names_in(s3.url)
    assert objects == s3.objects()
    assert {"step=10", "step=10-last"} <= set(names)
    assert all(nl.verify_checkpoint(f"{s3.url}/{name}").ok for name in ("step=10", "step=10-last"))


def test_a_run_that_was_killed_does_not_keep_the_next_one_out(s3, tmp_path):
    with started(SCRIPT, tmp_path, 200, "--dirpath", s3.url, "--pause", 0.1) as killed:
        wait_for(lambda: "step=5" in names_in(s3.url))
        kill(killed)
    life(s3.url, 15)
    assert {"step=15", "step=15-last"} <= set(names_in(s3.url))
