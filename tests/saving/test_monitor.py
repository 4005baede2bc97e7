from __future__ import annotations

from datetime import timedelta

import pytest

from nemologger.saving.monitor import is_meant_for_validation, why_it_cannot_appear

LIMITS = {"max_epochs": 5, "max_steps": -1}


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"limit_val_batches": 0}, "limit_val_batches=0"),
        ({"limit_val_batches": 0.0}, "limit_val_batches=0"),
        ({"check_val_every_n_epoch": 6}, "check_val_every_n_epoch=6"),
        ({"max_epochs": None, "check_val_every_n_epoch": 1001}, "max_epochs=1000"),
        ({"val_check_interval": 11, "max_steps": 10}, "val_check_interval=11"),
        ({"val_check_interval": 11, "max_steps": 10, "max_epochs": -1}, "max_steps=10"),
        ({"val_check_interval": 11, "max_steps": 10, "check_val_every_n_epoch": None}, "max_steps=10"),
        ({"val_check_interval": 21, "max_steps": 10, "accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (
            {"val_check_interval": 21, "check_val_every_n_epoch": None, "limit_train_batches": 4},
            "limit_train_batches=4",
        ),
    ],
)
def test_says_why_validation_never_runs(limits, reason):
    assert reason in (why_it_cannot_appear("val_loss", **{**LIMITS, **limits}) or "")


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"check_val_every_n_epoch": 5},
        {"max_epochs": -1, "check_val_every_n_epoch": 6},
        {"max_epochs": None, "max_steps": 10, "check_val_every_n_epoch": 6},
        {"max_epochs": None, "check_val_every_n_epoch": 1000},
        {"val_check_interval": 10, "max_steps": 10},
        {"val_check_interval": 20, "max_steps": 10, "accumulate_grad_batches": 2},
        {"val_check_interval": 10_000},
        {"val_check_interval": 10_000, "check_val_every_n_epoch": None},
        {"val_check_interval": 20, "check_val_every_n_epoch": None, "limit_train_batches": 4},
        {"val_check_interval": 0.25, "max_steps": 1},
        {"val_check_interval": timedelta(hours=1), "max_steps": 1},
        {"max_steps": 0, "limit_val_batches": 0},
        {"max_epochs": 0, "limit_val_batches": 0},
        {"limit_train_batches": 0, "limit_val_batches": 0},
    ],
)
def test_is_silent_where_validation_may_run_or_nothing_is_trained(limits):
    assert why_it_cannot_appear("val_loss", **{**LIMITS, **limits}) is None


@pytest.mark.parametrize(
    ("monitor", "is_validation"),
    [
        ("val_loss", True),
        ("val/acc", True),
        ("loss_val", True),
        ("valid_acc", True),
        ("loss/validation", True),
        ("valLoss", True),
        ("VAL_F1", True),
        ("reduced_val_loss", True),
        ("train_loss", False),
        ("value_loss", False),
        ("interval", False),
        ("retrieval_recall", False),
        (None, False),
    ],
)
def test_only_a_metric_of_validation_depends_on_it(monitor, is_validation):
    assert (why_it_cannot_appear(monitor, limit_val_batches=0, **LIMITS) is not None) == is_validation


@pytest.mark.parametrize(
    ("monitor", "is_meant"),
    [
        ("vall_loss", True),
        ("val_los", True),
        ("val_constrained_loss", True),
        ("train_los", False),
        ("reward", False),
        (None, False),
    ],
)
def test_a_slip_of_what_validation_logs_is_meant_for_it(monitor, is_meant):
    assert is_meant_for_validation(monitor, ["val_loss", "valid_mean_accuracy"]) is is_meant


def test_the_same_metric_of_training_is_none_of_validation():
    assert not is_meant_for_validation("train_mean_accuracy", ["valid_mean_accuracy"])
