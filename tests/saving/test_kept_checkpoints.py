"""Exactly the promised checkpoints exist after any sequence of saves and resumes."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from helpers.saved_run import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import Scored, ToyModel, loader, manifests, names, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint
from nemologger.checkpoint.verify import problems
from nemologger.disk import LocalDisk


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("top_k", [0, 1, 2, -1])
def test_exactly_the_promised_directories_exist(tmp_path, mode, top_k):
    scores = [0.5, 0.1, math.nan, math.inf, 0.3, 0.1, 0.9, -math.inf]
    run(
        tmp_path, 8, Scored(scores=scores), monitor="val_loss", mode=mode, save_top_k=top_k, every_n_train_steps=1,
        trainer={"val_check_interval": 1},
    )  # fmt: skip
    expected = _best(scores, mode, top_k)
    assert set(names(tmp_path)) == {f"step={step}" for step in expected} | {"step=8-last"}


def _best(scores: list[float], mode: str, k: int) -> set[int]:
    """The steps of the best k: nan last, of equals the first."""
    sign = 1 if mode == "min" else -1
    order = sorted(range(1, len(scores) + 1), key=lambda s: (math.isnan(scores[s - 1]), sign * scores[s - 1], s))
    return set(order if k == -1 else order[:k])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scores=st.lists(st.sampled_from([0.0, 0.1, 0.2, math.nan, math.inf, -math.inf]), min_size=6, max_size=6),
    lives=st.lists(st.integers(1, 5), max_size=2, unique=True),
    mode=st.sampled_from(["min", "max"]),
    last=st.sampled_from([True, "link", False]),
)
def test_what_is_kept_does_not_depend_on_how_often_the_run_was_resumed(tmp_path_factory, scores, lives, mode, last):
    directory = tmp_path_factory.mktemp("run")
    resume = None
    for steps in [*sorted(lives), 6]:
        checkpoint, _ = run(
            directory, steps, Scored(scores=scores), resume, mode=mode, save_top_k=2, save_last=last, every_n_train_steps=1,
            trainer={"val_check_interval": 1},
        )  # fmt: skip
        newest = max(checkpoint.shelf.kept, key=lambda kept: kept.step)
        resume = newest.path if newest.step == steps else None
        if resume is None and steps != 6:  # save_last=False kept nothing of this step: it cannot be resumed exactly
            return
    best = _best(scores, mode, 2)
    targets = {6} if last == "link" else set()
    expected = {f"step={s}" for s in best | targets} | ({"step=6-last"} if last else set())
    assert set(names(directory)) == expected
    assert Path(checkpoint.best_model_path).name == f"step={min(best, key=lambda s: _rank(scores, mode, s))}"
    assert {Path(p).name for p in checkpoint.best_k_models} == {f"step={s}" for s in best}


def _rank(scores: list[float], mode: str, step: int) -> tuple[bool, float, int]:
    sign = 1 if mode == "min" else -1
    return math.isnan(scores[step - 1]), sign * scores[step - 1], step


def test_scores_survive_a_resume_even_if_the_names_do_not_hold_them(tmp_path):
    first, _ = run(tmp_path, 10, filename="{step}")
    second, _ = run(tmp_path, 15, resume=first.last_model_path, filename="{step}")
    scores = {name: m.score for name, m in manifests(tmp_path).items() if m.ranked}
    assert {Path(p).name: s.item() for p, s in second.best_k_models.items()} == pytest.approx(scores)
    assert second.best_model_score is not None
    assert second.best_model_score.item() == pytest.approx(min(scores.values()))


def test_without_a_metric_the_newest_are_kept(tmp_path):
    run(tmp_path, 20, monitor=None, save_top_k=2)
    assert names(tmp_path) == ["step=15", "step=20", "step=20-last"]


def test_two_monitors_keep_their_own(tmp_path):
    both = [
        ModelCheckpoint(dirpath=tmp_path, filename="a-{step}", monitor="val_loss", save_top_k=1, every_n_train_steps=5),
        ModelCheckpoint(
            dirpath=tmp_path, filename="b-{step}", monitor="train_loss", mode="max", save_top_k=1, every_n_train_steps=5,
            save_last=False,
        ),
    ]  # fmt: skip
    quiet_trainer(max_steps=15, callbacks=both).fit(ToyModel(), loader(), loader())
    kept = names(tmp_path)
    assert len([n for n in kept if n.startswith("a-") and not n.endswith("-last")]) == 1
    assert len([n for n in kept if n.startswith("b-")]) == 1
    assert [n for n in kept if n.endswith("-last")] == ["a-step=15-last"]


def test_two_callbacks_that_would_write_the_same_names_are_refused(tmp_path):
    both = [ModelCheckpoint(dirpath=tmp_path, filename="x", monitor=m) for m in ("val_loss", "val_acc")]
    with pytest.raises(ConfigurationError, match="give each a filename of its own"):
        quiet_trainer(max_steps=5, callbacks=both).fit(ToyModel(), loader(), loader())


def test_last_stands_by_itself_but_its_bytes_are_not_written_twice(tmp_path):
    run(tmp_path, 5)
    for file in (tmp_path / "step=5" / "weights").iterdir():
        assert os.stat(file).st_ino == os.stat(tmp_path / "step=5-last" / "weights" / file.name).st_ino
    LocalDisk().remove(tmp_path / "step=5")
    assert problems(tmp_path / "step=5-last") == []
    checkpoint, _ = run(tmp_path, 10, resume=str(tmp_path / "step=5-last"))
    assert Path(checkpoint.last_model_path).name == "step=10-last"


def test_a_link_is_relative_and_what_it_names_stays(tmp_path):
    scores = [0.1, 0.2, 0.3, 0.4]
    run(
        tmp_path, 4, Scored(scores=scores), save_top_k=1, save_last="link", every_n_train_steps=1,
        trainer={"val_check_interval": 1},
    )  # fmt: skip
    assert names(tmp_path) == ["step=1", "step=4", "step=4-last"]
    assert (tmp_path / "step=4-last").is_symlink()
    assert os.readlink(tmp_path / "step=4-last") == "step=4"
    before = (tmp_path / "step=1" / "manifest.json").read_bytes()
    run(
        tmp_path, 6, Scored(scores=[*scores, 0.5, 0.6]), str(tmp_path / "step=4-last"), save_top_k=1, save_last="link",
        every_n_train_steps=1, trainer={"val_check_interval": 1},
    )  # fmt: skip
    assert names(tmp_path) == ["step=1", "step=6", "step=6-last"]
    assert (tmp_path / "step=1" / "manifest.json").read_bytes() == before


def test_the_same_name_is_replaced_never_numbered(tmp_path):
    run(tmp_path, 15, filename="best", save_top_k=1)
    assert names(tmp_path) == ["best", "best-last"] or names(tmp_path) == ["best-last"]
    assert all(problems(tmp_path / name) == [] for name in names(tmp_path))


def test_leftovers_of_a_dead_run_are_cleaned_up(tmp_path):
    checkpoint, _ = run(tmp_path, 5)
    (tmp_path / "step=7").mkdir()
    (tmp_path / "step=7" / "weights").mkdir()
    (tmp_path / "step=7-unfinished").touch()
    run(tmp_path, 10, resume=checkpoint.last_model_path)
    assert names(tmp_path) == ["step=10", "step=10-last", "step=5"]


def test_lightnings_words_for_checkpoints_work(tmp_path):
    checkpoint, _ = run(tmp_path, 10)
    trainer = quiet_trainer(max_steps=12, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="{step}")])
    trainer.fit(ToyModel(), loader(), loader(), ckpt_path="last")
    assert trainer.global_step == 12
    validated = trainer.validate(ToyModel(), loader(), ckpt_path=checkpoint.best_model_path, verbose=False)
    assert validated[0]["val_loss"] == pytest.approx(checkpoint.best_model_score.item())


def _scored(directory: Path, scores: list[float], **options: Any) -> ModelCheckpoint:
    """A run that validates and saves every step, with these scores."""
    settings = {"every_n_train_steps": 1, "trainer": {"val_check_interval": 1}, **options}
    return run(directory, len(scores), Scored(scores=scores), **settings)[0]


def test_a_worse_one_does_not_replace_the_best_under_the_same_name(tmp_path):
    _scored(tmp_path / "a", [0.1, 0.5, 0.7, 0.9], filename="best", save_top_k=1)
    assert {name: m.score for name, m in manifests(tmp_path / "a").items()} == {"best": 0.1, "best-last": 0.9}
    _scored(tmp_path / "b", [0.9, 0.5, 0.7, 0.1], filename="best", save_top_k=1)
    assert {name: m.score for name, m in manifests(tmp_path / "b").items()} == {"best": 0.1, "best-last": 0.1}


def test_a_template_that_gives_two_steps_the_same_name_still_keeps_the_best(tmp_path):
    _scored(tmp_path, [0.100, 0.104, 0.9], filename="{epoch:02d}-{val_loss:.2f}", save_top_k=2, save_last=False)
    assert {m.step for m in manifests(tmp_path).values()} == {1, 2}
    assert "epoch=00-val_loss=0.10-step=2" in names(tmp_path)


@pytest.mark.parametrize("last", [True, "link"])
def test_somebodys_copy_is_not_ours_to_remove(tmp_path, last):
    checkpoint = _scored(tmp_path, [0.5, 0.4], save_top_k=1, save_last=last)
    shutil.copytree(tmp_path / "step=2", tmp_path / "before-the-change")
    shutil.copytree(checkpoint.last_model_path, tmp_path / "kept-last")
    _scored(tmp_path, [0.5, 0.4, 0.3, 0.2], save_top_k=1, save_last=last, resume=checkpoint.last_model_path)
    assert names(tmp_path) == ["before-the-change", "kept-last", "step=4", "step=4-last"]


def test_last_is_found_in_the_default_directory_too(tmp_path):
    for steps in (5, 8):
        trainer = quiet_trainer(
            max_steps=steps, default_root_dir=tmp_path, callbacks=[ModelCheckpoint(every_n_train_steps=5)]
        )
        model = ToyModel()
        trainer.fit(model, loader(), loader(), ckpt_path="last" if steps == 8 else None)
    assert sorted(model.losses) == [5, 6, 7]


def test_a_smaller_k_makes_room_before_the_first_save_but_never_removes_what_was_resumed_from(tmp_path):
    _scored(tmp_path, [0.5, 0.4, 0.3, 0.2, 0.1, 0.6], save_top_k=-1, save_last=False)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append(names(tmp_path))

    _scored(tmp_path, [0.0] * 7, save_top_k=1, save_last=False, resume=str(tmp_path / "step=6"), others=[Look()])
    assert seen == [[".lock", ".trained_steps", "step=5", "step=6"]]
    assert names(tmp_path) == ["step=7"]
