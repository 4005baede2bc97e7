"""What a store does not answer, or not in time, is not known: neither damaged, nor absent, nor somebody else's."""

from __future__ import annotations

import logging
import random
import re
import threading
import time

import lightning.pytorch as pl
import pytest
from helpers.s3 import MISHAPS
from helpers.stored_run import At, life, names_in
from toy import ToyModel, loader, quiet_trainer
from toy import names as local_names

import nemologger as nl
from nemologger.checkpoint.find import survey
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.writing import in_flight, progress
from nemologger.stores import store
from nemologger.stores.path import storage_path
from nemologger.verify import main as verify_main


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(store, "PATIENCE", 0.5)
    monkeypatch.setattr(store, "_KNOWN_DOWN", 0.5)


@pytest.mark.parametrize(
    ("how", "file"),
    [
        ("refuse", "manifest.json"),
        *(("deny", f"weights/{name}") for name in (".metadata", "common.pt", "__0_0.distcp")),
    ],
)
def test_a_newest_checkpoint_that_cannot_be_read_now_is_not_passed_over(s3, impatient, capsys, how, file):
    """Training on from the one before, the newest would be surplus soon."""
    life(s3.url, 10)
    s3.gate.rule = lambda request: how if request.startswith("GET") and f"step%3D10/{file}" in request else "pass"
    for resume in ({"resume_from_directory": s3.url}, {"resume_from_path": f"{s3.url}/step=10"}):
        with pytest.raises(nl.CheckpointError, match=r"step=10.*cannot be reached(.|\n)*nothing was started") as error:
            nl.AutoResume(**resume).setup(quiet_trainer(max_steps=20))
        assert not isinstance(error.value, nl.DamagedCheckpointError)
    assert verify_main([s3.url]) == 2
    assert "step=10" in capsys.readouterr().out
    assert names_in(s3.url) == ["step=10", "step=10-last", "step=5"]


def test_a_server_that_is_gone_for_a_while_costs_saves_and_nothing_else(s3, impatient, caplog):
    def gone() -> None:
        s3.gate.rule = lambda request: "refuse"

    def back() -> None:
        s3.gate.rule = lambda request: "pass"

    life(s3.url, 5)
    with caplog.at_level(logging.INFO):
        _, model = life(s3.url, 20, others=[At({7: gone, 13: back})])
    assert "save 1 of at most 3 in a row that may fail" in caplog.text
    assert len(model.losses) == 15
    assert names_in(s3.url) == ["step=15", "step=20", "step=20-last"]
    assert s3.pending() == []


def test_after_three_failed_saves_the_run_stops_and_the_one_before_is_the_newest(s3, impatient):
    def gone() -> None:
        s3.gate.rule = lambda request: "refuse"

    with pytest.raises(nl.SaveFailedError, match=r"step=20.*(refused|[Cc]onnect)"):
        life(s3.url, 40, others=[At({7: gone})])
    s3.gate.rule = lambda request: "pass"
    assert "step=5" in names_in(s3.url)
    resumed = nl.AutoResume(resume_from_directory=s3.url).setup(quiet_trainer(max_steps=40))
    assert resumed.step == 5
    _, model = life(s3.url, 10)
    assert sorted(model.losses) == list(range(5, 10))
    left = set(names_in(s3.url)) - {".owner"}  # which the first run could not take back
    assert left == {"step=10", "step=10-last", "step=5"}


def test_beside_training_too_a_failed_save_is_counted(s3, caplog):
    denied = iter(["deny"])

    def rule(request: str) -> str:
        return (
            next(denied, "pass")
            if "step%3D10/weights/__0_0" in request or "step=10/weights/__0_0" in request
            else "pass"
        )

    s3.gate.rule = rule
    with caplog.at_level(logging.INFO):
        life(s3.url, 15, async_save=True)
    assert "save 1 of at most 3 in a row that may fail" in caplog.text
    assert "not for you" in caplog.text
    assert names_in(s3.url) == ["step=15", "step=15-last", "step=5"]


def test_without_the_right_to_remove_any_more_saves_go_on(s3):
    """What is surplus stays."""

    def deny() -> None:
        s3.gate.rule = lambda request: "deny" if request.startswith("DELETE") else "pass"

    life(s3.url, 20, others=[At({7: deny})])
    s3.gate.rule = lambda request: "pass"
    found = [f.manifest.step for f in survey(storage_path(s3.url)) if f.manifest]
    assert set(found) >= {5, 10, 15, 20}


def test_an_upload_that_is_waited_for_says_how_far_it_is(s3, monkeypatch, caplog):
    """The store shows nothing of a file before all of it is there."""
    monkeypatch.setattr(in_flight, "TURN", 0.2)
    monkeypatch.setattr(progress, "EVERY", 0.2)
    s3.gate.rule = lambda request: "slow" if "__0_0" in request and "step%3D5" in request else "pass"
    with caplog.at_level(logging.INFO):
        life(s3.url, 6, model=ToyModel(width=60_000), async_save=True, files_per_rank=1)
    assert [int(sent) for sent in re.findall(r"step=5: (\d+) of 9 MB written", caplog.text) if sent != "0"]


def test_an_exception_in_training_waits_for_what_is_on_its_way(s3):
    def fail() -> None:
        threading.Timer(1.0, s3.gate.release).start()
        raise RuntimeError("of the model")

    s3.gate.rule = lambda request: "hold" if request.startswith("PUT") and "__0_0" in request else "pass"
    with pytest.raises(RuntimeError, match="of the model"):
        life(s3.url, 20, async_save=True, others=[At({7: fail})])
    assert [found.manifest.step for found in survey(storage_path(s3.url))] == [5, 5]


def test_keys_that_expire(s3, tmp_path, monkeypatch, caplog):
    """What the store says is passed on; and new ones are used when they are where the old ones were."""
    file = tmp_path / "credentials"

    def renew(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")

    def expire(key: str) -> None:
        s3.gate.expired = key

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    renew("first")
    _, model = life(s3.url, 15, others=[At({7: lambda: expire("first"), 12: lambda: renew("second")})])
    assert len(model.losses) == 15
    assert "save 1 of at most 3" in caplog.text
    assert "The provided token has expired" in caplog.text
    assert names_in(s3.url) == ["step=15", "step=15-last", "step=5"]
    expire("second")
    for resume in (True, False):
        with pytest.raises(nl.NemologgerError, match=rf"{s3.url}.*: The provided token has expired\..*credentials"):
            life(s3.url, 20, resume=resume)
    monkeypatch.undo()


@pytest.mark.parametrize("what", ["list-type", ".metadata"])
def test_a_store_that_goes_away_at_the_start(s3, impatient, what):
    """Behind the check that it can be used: when it is looked through, or when what was chosen is read."""

    def rule(request: str) -> str:
        is_checked = any(earlier.startswith("DELETE") for earlier in s3.gate.requests)
        return "refuse" if is_checked and what in request else "pass"

    life(s3.url, 5)
    s3.gate.requests.clear()
    s3.gate.rule = rule
    with pytest.raises(nl.CheckpointError, match=r"cannot be reached(.|\n)*nothing was started"):
        life(s3.url, 10)


def test_any_request_may_go_wrong(s3, tmp_path, monkeypatch):
    """Trying again is enough, and nobody sees a difference."""
    chance = random.Random(0)
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.01)
    s3.gate.rule = lambda request: chance.choice(MISHAPS) if chance.random() < 0.06 else "pass"
    for steps, beside in ((6, False), (10, True)):
        _, undisturbed = life(tmp_path / "local", steps)
        _, model = life(s3.url, steps, async_save=beside)
        assert model.losses == undisturbed.losses
    s3.gate.rule = lambda request: "pass"
    found = survey(storage_path(s3.url))
    assert [one.path.name for one in found] == local_names(tmp_path / "local")
    assert all(problems(one.path) == [] for one in found)
    listed = {f"{one.path.resolve().name}/{name}" for one in found for name in ("manifest.json", *one.manifest.files)}
    assert set(s3.objects()) == {"step=10-last.link", *listed}
    assert s3.pending() == []


def test_training_does_not_wait_for_a_store(s3):
    """While the last request of a save is not answered, steps are taken."""

    def is_commit(request: str) -> bool:
        return request.startswith("PUT") and "manifest.json" in request

    s3.gate.rule = lambda request: "hold" if is_commit(request) else "pass"
    taken = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            time.sleep(0.05)
            if any(map(is_commit, s3.gate.requests)):
                taken.append(trainer.global_step)
            if len(taken) == 5:
                assert not any(found.manifest for found in survey(storage_path(s3.url)))
                s3.gate.rule = lambda request: "pass"
                s3.gate.release()
            trainer.should_stop = len(taken) > 10

    life(s3.url, 2000, async_save=True, on_busy="skip", others=[Watch()], resume=False, trainer={"min_steps": 0})
    assert len(taken) > 10
    assert all(problems(found.path) == [] for found in survey(storage_path(s3.url)))
    assert names_in(s3.url)


def test_a_store_that_cannot_be_reached_is_no_reason_to_start_from_scratch(s3, impatient):
    life(s3.url, 5)
    s3.gate.rule = lambda request: "refuse"
    with pytest.raises(nl.CheckpointError, match=r"cannot be reached(.|\n)*nothing was started"):
        life(s3.url, 10)


@pytest.mark.parametrize(
    ("where", "why"), [("s3://no-such-bucket/runs", "bucket does not exist"), ("s3:///runs", "names no bucket")]
)
def test_a_place_that_cannot_be_written_to_is_found_before_training(s3, where, why):
    model = ToyModel()
    with pytest.raises(nl.ConfigurationError, match=why):
        life(where, 5, model=model, resume=False)
    assert model.losses == {}


@pytest.mark.parametrize(("method", "what"), [("PUT", "written"), ("GET", "read"), ("DELETE", "removed")])
def test_what_every_save_needs_is_tried_before_training(s3, method, what):
    s3.gate.rule = lambda request: "deny" if request.startswith(method) and "list-type" not in request else "pass"
    model = ToyModel()
    with pytest.raises(nl.ConfigurationError, match=f"an object could not be {what} there"):
        life(s3.url, 5, model=model, resume=False)
    assert model.losses == {}
    s3.gate.rule = lambda request: "pass"
    life(s3.url, 5)
    assert all("unfinished" not in key for key in s3.objects())


def test_lightnings_own_search_for_the_last_one_is_refused(s3):
    life(s3.url, 5)
    trainer = quiet_trainer(max_steps=10, callbacks=[nl.ModelCheckpoint(dirpath=s3.url, every_n_train_steps=5)])
    with pytest.raises(nl.ConfigurationError, match=r"AutoResume\(resume_if_exists=True\)"):
        trainer.fit(ToyModel(), loader(), loader(), ckpt_path="last")


def test_credentials_are_used_and_stay_out_of_checkpoints(s3, monkeypatch):
    options = {"endpoint_url": s3.gate.endpoint, "key": "test", "secret": "a-secret-that-nobody-keeps"}
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    life(s3.url, 5, options=options)
    _, model = life(s3.url, 10, options=options, async_save=True)
    assert sorted(model.losses) == list(range(5, 10))
    assert nl.verify_checkpoint(f"{s3.url}/step=10", storage_options=options).ok
    nl.load_weights(f"{s3.url}/step=10", ToyModel(), storage_options=options)
    resume = nl.AutoResume(resume_from_path=f"{s3.url}/step=5", storage_options=options)
    trainer = quiet_trainer(max_steps=6)
    assert resume.setup(trainer).step == 5
    trainer.fit(ToyModel(), loader(), loader())
    assert "secret" not in repr(resume)
    for key in s3.objects():
        assert b"nobody-keeps" not in s3.client.get_object(Bucket=s3.name, Key=f"runs/{key}")["Body"].read()
    monkeypatch.undo()
