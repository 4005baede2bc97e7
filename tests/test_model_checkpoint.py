"""When to save and what to keep: every promise of ModelCheckpoint on real runs."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import SAMPLES, Scored, ToyModel, loader, manifests, names, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint, SaveFailedError, lightning_port
from nemologger.checkpoint.verify import problems
from nemologger.disk import LocalDisk


def run(
    directory: Path,
    steps: int,
    model: ToyModel | None = None,
    resume: str | None = None,
    trainer: dict[str, Any] | None = None,
    others: Sequence[pl.Callback] = (),
    **options: Any,
) -> tuple[ModelCheckpoint, ToyModel]:
    """One life of a run that saves into ``directory`` every five steps."""
    settings: dict[str, Any] = {"dirpath": directory, "filename": "{step}", "every_n_train_steps": 5, **options}
    checkpoint = ModelCheckpoint(**settings)
    model = model or ToyModel()
    trainer = quiet_trainer(max_steps=steps, callbacks=[*others, checkpoint], **(trainer or {}))
    trainer.fit(model, loader(), loader(), ckpt_path=resume)
    return checkpoint, model


def test_the_defaults_are_nemos():
    checkpoint = ModelCheckpoint()
    assert (checkpoint.monitor, checkpoint.mode, checkpoint.save_top_k, checkpoint.save_last) == (
        "val_loss",
        "min",
        3,
        True,
    )
    assert checkpoint.verbose
    assert checkpoint.save_optim_on_train_end
    assert checkpoint.always_save_context
    assert checkpoint.save_context_on_train_end
    assert not checkpoint.save_weights_only


def test_a_checkpoint_has_the_layout_and_is_whole(tmp_path):
    run(tmp_path, 5, filename="{val_loss:.2f}-{epoch}-{step}-{consumed_samples}-{model_name}")
    saved, last = names(tmp_path)
    assert last == f"{saved}-last"
    assert saved.startswith("val_loss=")
    assert saved.endswith("-epoch=0-step=5-consumed_samples=20-ToyModel")
    assert {"context", "weights", "manifest.json"} == set(names(tmp_path / saved))
    assert {"common.pt", "metadata.json", ".metadata", "__0_0.distcp", "__0_1.distcp"} == set(
        names(tmp_path / saved / "weights")
    )
    assert {"io.json", "model.yaml"} <= set(names(tmp_path / saved / "context"))
    assert problems(tmp_path / saved) == problems(tmp_path / last) == []


def test_a_metric_that_does_not_exist_yet_is_left_out_of_the_name(tmp_path):
    with pytest.raises(_StoppedError):
        run(
            tmp_path, 9, filename="run--{val_loss:.4f}-{epoch}-{step}", every_n_train_steps=2,
            trainer={"val_check_interval": 3}, others=[_StopAt(2)],
        )  # fmt: skip
    assert names(tmp_path) == ["run--epoch=0-step=2-last"]


class _StoppedError(Exception):
    """Training ended on purpose."""


class _StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step >= self.step:
            raise _StoppedError


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


def test_the_final_state_is_saved_off_the_interval_and_goes_on_in_the_middle_of_the_epoch(tmp_path):
    checkpoint, _ = run(tmp_path, 13)
    assert Path(checkpoint.last_model_path).name == "step=13-last"
    assert manifests(tmp_path)["step=13-last"].epoch == 1  # ten steps an epoch: the fourth of the second
    checkpoint, _ = run(tmp_path, 16, resume=checkpoint.last_model_path)
    assert manifests(tmp_path)["step=16-last"].epoch == 1


def test_without_optimizer_at_the_end(tmp_path):
    run(tmp_path, 5, save_optim_on_train_end=False)
    saved = manifests(tmp_path)
    assert saved["step=5"].has_optimizer
    assert not saved["step=5-last"].has_optimizer
    assert names(tmp_path) == ["step=5", "step=5-last"]


def test_weights_only(tmp_path):
    run(tmp_path, 5, save_weights_only=True)
    assert not any(m.has_optimizer for m in manifests(tmp_path).values())


def test_samples_are_counted_from_the_batches(tmp_path):
    run(tmp_path, 12, trainer={"accumulate_grad_batches": 2})
    # 24 batches of 4; ten batches an epoch
    assert manifests(tmp_path)["step=12-last"].consumed_samples == 96
    run(tmp_path, 14, resume=str(tmp_path / "step=12-last"), trainer={"accumulate_grad_batches": 2})
    assert manifests(tmp_path)["step=14-last"].consumed_samples == 112


def test_epochs_are_counted(tmp_path):
    run(
        tmp_path, -1, every_n_train_steps=None, every_n_epochs=1, filename="{epoch}", save_top_k=-1,
        trainer={"max_epochs": 3, "check_val_every_n_epoch": 1, "val_check_interval": 1.0},
    )  # fmt: skip
    saved = manifests(tmp_path)
    assert [name for name in saved if not name.endswith("last")] == ["epoch=0", "epoch=1", "epoch=2"]
    assert [saved[f"epoch={e}"].epochs_done for e in range(3)] == [1, 2, 3]
    assert saved["epoch=2"].consumed_samples == 3 * SAMPLES


def test_a_time_interval_saves_without_steps(tmp_path):
    run(
        tmp_path,
        4,
        every_n_train_steps=None,
        train_time_interval=timedelta(0),
        trainer={"val_check_interval": 1},
        save_top_k=-1,
    )
    assert names(tmp_path) == ["step=1", "step=2", "step=3", "step=4", "step=4-last"]


def test_at_the_end_of_training_epochs(tmp_path):
    run(
        tmp_path, -1, monitor="train_loss", every_n_train_steps=None, every_n_epochs=1, save_on_train_epoch_end=True,
        trainer={"max_epochs": 2, "check_val_every_n_epoch": 1, "val_check_interval": 1.0},
    )  # fmt: skip
    assert names(tmp_path) == ["step=10", "step=20", "step=20-last"]


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


class _FullDisk(LocalDisk):
    """Has no space while ``full``."""

    full = False

    def write(self, path, parts):
        if self.full and path.suffix == ".distcp":
            raise OSError(28, "No space left on device", str(path))
        super().write(path, parts)


class _FillUp(pl.Callback):
    def __init__(self, disk: _FullDisk, steps: range) -> None:
        self.disk, self.steps = disk, steps

    def on_train_batch_start(self, trainer, *args):
        self.disk.full = trainer.global_step in self.steps


def test_a_failed_save_is_loud_and_training_goes_on(tmp_path, caplog):
    disk = _FullDisk()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, disk=disk, save_top_k=-1)
    trainer = quiet_trainer(max_steps=6, val_check_interval=1, callbacks=[_FillUp(disk, range(2, 4)), checkpoint])
    with caplog.at_level(logging.ERROR):
        trainer.fit(ToyModel(), loader(), loader())
    failed = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(failed) == 2
    assert "No space left on device" in failed[0]
    assert names(tmp_path) == ["step=1", "step=2", "step=5", "step=6", "step=6-last"]


def test_too_many_failed_saves_in_a_row_raise(tmp_path):
    disk = _FullDisk()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, disk=disk)
    trainer = quiet_trainer(max_steps=9, val_check_interval=1, callbacks=[_FillUp(disk, range(2, 9)), checkpoint])
    with pytest.raises(SaveFailedError, match="No space left"):
        trainer.fit(ToyModel(), loader(), loader())
    assert trainer.global_step == 5  # 3, 4 and 5 failed
    assert "step=2-last" in names(tmp_path)


def test_a_failed_final_save_raises(tmp_path):
    disk = _FullDisk()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, disk=disk)
    trainer = quiet_trainer(max_steps=5, val_check_interval=1, callbacks=[_FillUp(disk, range(4, 9)), checkpoint])
    with pytest.raises(SaveFailedError):
        trainer.fit(ToyModel(), loader(), loader())
    assert "step=4-last" in names(tmp_path)


def test_a_metric_that_nobody_logs_is_an_error_after_the_first_validation_and_costs_nothing(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no such metric was logged.*train_loss") as error:
        run(tmp_path, 10, monitor="val_acc")
    assert "step=5-last" in str(error.value)
    assert names(tmp_path) == ["step=5-last"]


def test_without_validation_a_metric_that_nobody_logs_is_told_once(tmp_path, caplog):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="trainloss", filename="{step}", every_n_train_steps=2)
    trainer = quiet_trainer(max_steps=6, callbacks=[checkpoint])
    trainer.fit(ToyModel(), loader())
    told = [record.getMessage() for record in caplog.records if "'trainloss'" in record.getMessage()]
    assert len(told) == 1
    assert "step=2-last is kept as the newest, not as one of the best" in told[0]
    assert "'train_loss'" in told[0]
    assert names(tmp_path) == ["step=6-last"]


def test_an_argument_that_does_not_exist_is_told_with_the_one_that_was_meant():
    with pytest.raises(TypeError, match="'every_n_train_step'; did you mean 'every_n_train_steps'"):
        ModelCheckpoint(every_n_train_step=5)
    with pytest.raises(TypeError, match=r"'colour'$"):
        ModelCheckpoint(colour="red")


def test_validation_that_never_runs_is_an_error_before_the_first_step(tmp_path):
    model = ToyModel()
    with pytest.raises(ConfigurationError, match="can never appear"):
        run(tmp_path, 3, model, trainer={"val_check_interval": 5})
    with pytest.raises(ConfigurationError, match="no validation data"):
        quiet_trainer(max_steps=5, callbacks=[ModelCheckpoint(dirpath=tmp_path)]).fit(model, loader())
    assert model.losses == {}


def test_a_template_that_cannot_be_filled_is_an_error_at_once():
    with pytest.raises(ConfigurationError, match=r"\{model_name:d\}"):
        ModelCheckpoint(filename="{model_name:d}")


def test_nemo_1s_arguments_say_what_to_use(caplog):
    ModelCheckpoint(always_save_nemo=True, save_nemo_on_train_end=True, model_parallel_size=2)
    assert len(caplog.records) == 3
    with pytest.raises(TypeError, match="save_topk"):
        ModelCheckpoint(save_topk=3)


def test_lightnings_words_for_checkpoints_work(tmp_path):
    checkpoint, _ = run(tmp_path, 10)
    trainer = quiet_trainer(max_steps=12, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="{step}")])
    trainer.fit(ToyModel(), loader(), loader(), ckpt_path="last")
    assert trainer.global_step == 12
    validated = trainer.validate(ToyModel(), loader(), ckpt_path=checkpoint.best_model_path, verbose=False)
    assert validated[0]["val_loss"] == pytest.approx(checkpoint.best_model_score.item())


def test_resuming_restores_everything_lightning_keeps(tmp_path):
    _, straight = run(tmp_path / "a", 20)
    first, _ = run(tmp_path / "b", 10)
    _, resumed = run(tmp_path / "b", 20, resume=first.last_model_path)
    assert {step: loss for step, loss in straight.losses.items() if step >= 10} == resumed.losses


def test_fast_dev_run_saves_nothing(tmp_path):
    run(tmp_path / "x", 5, trainer={"fast_dev_run": True})
    assert not (tmp_path / "x").exists()


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


def test_early_stopping_can_be_resumed(tmp_path):
    def live(steps: int, resume: str | None) -> pl.Trainer:
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}")
        stopping = pl.callbacks.EarlyStopping("val_loss", patience=100)
        trainer = quiet_trainer(
            max_epochs=steps, check_val_every_n_epoch=1, val_check_interval=1.0, callbacks=[stopping, checkpoint]
        )
        trainer.fit(ToyModel(), loader(), loader(), ckpt_path=resume)
        return trainer

    live(1, None)
    # as after a crash: the checkpoint of the last validation, before the epoch's end
    assert live(3, str(tmp_path / "step=10")).global_step == 30


def test_without_validation_every_epoch_is_saved(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", monitor=None, save_top_k=-1, save_last=False)
    trainer = quiet_trainer(max_epochs=3, check_val_every_n_epoch=1, val_check_interval=1.0, callbacks=[checkpoint])
    trainer.fit(ToyModel(), loader())
    assert names(tmp_path) == ["epoch=0", "epoch=1", "epoch=2"]


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
    assert seen == [[".lock", "step=5", "step=6"]]
    assert names(tmp_path) == ["step=7"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"save_top_k": "3"}, "save_top_k='3'"),
        ({"save_last": "yes"}, "save_last='yes'"),
        ({"train_time_interval": 60}, "datetime.timedelta"),
        ({"files_per_rank": 0}, "files_per_rank=0"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(options, named):
    with pytest.raises(ConfigurationError, match=named):
        ModelCheckpoint(**options)


def test_a_file_where_the_directory_should_be_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    model = ToyModel()
    with pytest.raises(ConfigurationError, match="dirpath="):
        run(tmp_path / "file", 5, model)
    assert model.losses == {}


def test_nothing_is_saved_in_the_middle_of_gradient_accumulation(tmp_path):
    run(
        tmp_path, 3, every_n_train_steps=None, train_time_interval=timedelta(0), save_top_k=-1, monitor="train_loss",
        trainer={"accumulate_grad_batches": 2, "val_check_interval": 100, "limit_val_batches": 0},
    )  # fmt: skip
    # each of the three steps took two batches of four, and was saved once, after the second
    assert {m.consumed_samples for m in manifests(tmp_path).values()} == {8, 16, 24}


@pytest.mark.parametrize("beside", [False, True])
def test_save_now_keeps_what_nobody_asked_for_until_the_next_save(tmp_path, beside):
    """Of a moment that is neither among the best nor to be the last one."""
    seen = {}

    class Now(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            lightning_port.move_to_end(trainer, self)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 7:
                trainer.checkpoint_callback.save_now(trainer)
                trainer.checkpoint_callback.save_now(trainer)
            if trainer.global_step >= 6:
                seen[trainer.global_step] = [name for name in names(tmp_path) if not name.startswith(".")]

    scores = [9.0, 9.0, 1.0, 9.0, 9.0, 2.0, 9.0, 9.0, 0.5]
    ckpt = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", save_top_k=1, save_last=False, every_n_train_steps=3, async_save=beside
    )
    trainer = quiet_trainer(max_steps=9, val_check_interval=3, callbacks=[ckpt, Now()])
    trainer.fit(Scored(scores=scores), loader(), loader())
    assert seen[7] == ["step=3", "step=7-last"]
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["step=9"]


def test_a_save_after_validation_in_the_middle_of_gradient_accumulation_waits_for_the_step(tmp_path):
    """Validation runs after batches 3, 6 and 9; steps end with batches 2, 4, 6, 8 and 10."""
    trainer = {"accumulate_grad_batches": 2, "val_check_interval": 3, "check_val_every_n_epoch": 1}
    options = {"trainer": trainer, "save_top_k": -1, "every_n_train_steps": None, "every_n_epochs": 1}
    _, straight = run(tmp_path / "straight", 7, **options)
    saved = {m.step: name for name, m in manifests(tmp_path / "straight").items() if not name.endswith("-last")}
    assert set(saved) == {2, 3, 5, 7}
    _, resumed = run(tmp_path / "resumed", 7, resume=str(tmp_path / "straight" / saved[2]), **options)
    assert resumed.losses
    assert {step: straight.losses[step] for step in resumed.losses} == resumed.losses


def test_starting_from_scratch_where_an_earlier_run_was_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "nemologger")
    run(tmp_path, 20)
    assert "starts from scratch" not in caplog.text
    caplog.clear()
    run(tmp_path, 5)
    assert (
        f"{tmp_path} holds checkpoints of an earlier run, up to step 20, and this one starts from scratch"
        in caplog.text
    )
    assert "AutoResume(resume_if_exists=True)" in caplog.text
    saved = [record.getMessage() for record in caplog.records if ": saved " in record.getMessage()]
    assert saved
    assert all(message.startswith(f"step 5: saved {tmp_path}/step=5") for message in saved)
    caplog.clear()
    run(tmp_path, 10, resume=str(tmp_path / "step=5-last"))
    assert "starts from scratch" not in caplog.text
