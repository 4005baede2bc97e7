"""What one fit says of its saves."""

from __future__ import annotations

import pytest

from nemologger.errors import ConfigurationError, SaveFailedError
from nemologger.saving.notices import Failures, Notices


def test_each_thing_is_said_once_and_what_has_been_said_is_not_looked_for_again(caplog):
    notices, looked = Notices(), []
    for name in ("a", "b"):
        notices.grown(name, lambda: looked.append(1) or [f"change {i}" for i in range(7)])
        notices.missing_metric("vall_loss", name, ["val_loss"], validated=False)
        notices.missing_fields("{los}-{step}", "loss", {"step": 1})
    assert len(looked) == 1
    grown, metric, field = (record.getMessage() for record in caplog.records)
    assert "checkpoint a, and later ones" in grown
    assert "change 4; and 2 more" in grown
    assert "monitor='vall_loss'" in metric
    assert "nobody has logged 'los' yet" in field


def test_a_metric_that_validation_has_not_logged_is_an_error():
    with pytest.raises(
        ConfigurationError,
        match=r"there are \['val_loss'\].* needs save_on_train_epoch_end=True.*What was trained so far is in x",
    ):
        Notices().missing_metric("vall_loss", "x", ["val_loss"], validated=True)


def test_saves_that_fail_are_counted_in_a_row(caplog):
    failures, error = Failures(2), SaveFailedError("the disk is full")
    failures.add(error, None, final=False)
    failures.end()
    failures.add(error, "step=2", final=False)
    assert "save 1 of at most 2" in caplog.text
    assert "there is no checkpoint yet" in caplog.text
    with pytest.raises(SaveFailedError, match=r"Training stops at save 2 .*the newest checkpoint is step=2"):
        failures.add(error, "step=2", final=False)


def test_the_final_save_may_not_fail():
    error = SaveFailedError("the disk is full")
    with pytest.raises(SaveFailedError) as raised:
        Failures(3).add(error, None, final=True)
    assert raised.value is error
