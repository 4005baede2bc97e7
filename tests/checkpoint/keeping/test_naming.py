"""Names of checkpoints: what they show, and that they are always the name of one directory."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemologger.checkpoint.keeping.naming import format_name
from nemologger.errors import ConfigurationError

DEFAULT = "gpt--{val_loss:.4f}-{epoch}-{step}"
NUMBERS = {"epoch": 0, "step": 10, "consumed_samples": 320, "model_name": "Gpt"}


@pytest.mark.parametrize(
    ("template", "metrics", "name"),
    [
        (DEFAULT, {"val_loss": 1.23456}, "gpt--val_loss=1.2346-epoch=0-step=10"),
        (DEFAULT, {}, "gpt--epoch=0-step=10"),
        (DEFAULT, {"val_loss": float("nan")}, "gpt--val_loss=nan-epoch=0-step=10"),
        (DEFAULT, {"val_loss": float("-inf")}, "gpt--val_loss=-inf-epoch=0-step=10"),
        (DEFAULT, {"val_loss": -1.0}, "gpt--val_loss=-1.0000-epoch=0-step=10"),
        ("{model_name}-{consumed_samples}", {}, "Gpt-consumed_samples=320"),
        ("{epoch:03d}", {}, "epoch=000"),
        ("{val/loss:.1f}-{step}", {"val/loss": 2.0}, "val_loss=2.0-step=10"),
        ("{val_loss}", {}, "checkpoint"),
        ("", {}, "checkpoint"),
        # What stands between underscores is not lost with its neighbour.
        ("{model_name}_{val_loss:.2f}_{step}", {}, "Gpt_step=10"),
        ("val {val_loss:.2f}_{step}", {}, "step=10"),
        ("({val_loss})-{step}", {}, "step=10"),
        ("{val_loss}{val_acc}-{step}", {"val_acc": 1}, "val_acc=1-step=10"),
        # A name is a name, and nothing else.
        ("../{step}", {}, "_step=10"),
        (".hidden-{step}", {}, "hidden-step=10"),
        (".", {}, "checkpoint"),
        ("..", {}, "checkpoint"),
        ("a\0b\n{step}", {}, "a_b_step=10"),
        ("{a{step}", {}, "checkpoint"),
        ("a}{", {}, "a}{"),
    ],
)
def test_a_template_is_filled_in(template, metrics, name):
    assert format_name(template, {**NUMBERS, **metrics}) == name


def test_names_of_fields_can_be_left_out():
    values = {"val_loss": 1.5, "epoch": 0, "step": 10}
    assert format_name(DEFAULT, values, insert_names=False) == "gpt--1.5000-0-10"
    assert format_name(DEFAULT, {"epoch": 0, "step": 10}, insert_names=False) == "gpt--0-10"


@pytest.mark.parametrize("template", ["{step:q}", "{model_name:.2f}", "{step:%Y%M%S}{step:5.5d}"])
def test_a_format_that_does_not_fit_is_an_error_that_shows_the_template(template):
    with pytest.raises(ConfigurationError) as caught:
        format_name(template, NUMBERS)
    assert template in str(caught.value)


@pytest.mark.parametrize("ending", ["-unfinished", "-replaced"])
def test_the_endings_of_unfinished_checkpoints_are_refused(ending):
    with pytest.raises(ConfigurationError, match=ending):
        format_name("{step}" + ending, NUMBERS)


def test_long_names_stay_short_and_different():
    """The step often comes last; cut off, one checkpoint would replace the next."""
    names = {format_name("{long}-{step}", {"long": "é" * 300, "step": step}) for step in range(50)}
    assert len(names) == 50
    assert max(len(os.fsencode(name)) for name in names) <= 200


odd = st.text(min_size=1, max_size=40).filter(lambda text: not set(text) & set("{}:"))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(odd, st.floats(), max_size=3), st.text(max_size=20))
def test_any_metric_gives_the_name_of_one_directory(tmp_path_factory, metrics, text):
    text = "".join(text.split("{")).replace("}", "")
    template = text + "-".join(f"{{{name}:.3f}}" for name in metrics) + "-{step}"
    name = format_name(template, {**metrics, "step": 1})
    assert name
    assert "/" not in name
    assert "\0" not in name
    assert not name.startswith((".", "-"))
    assert len(os.fsencode(name)) <= 200
    assert (os.path.join("a", name), os.path.basename(name)) == (f"a/{name}", name)


@settings(max_examples=100, deadline=None)
@given(odd)
def test_a_metric_that_is_missing_is_never_shown_as_zero(metric):
    name = format_name(f"run-{{{metric}:.4f}}-{{step}}", {"step": 7} if metric != "step" else {})
    assert "0.0000" not in name
    assert name in ("run-step=7", "run", f"run-{metric}")


def test_the_name_can_be_made(tmp_path):
    path = tmp_path / format_name("\ud800{m}-{step}", {"m": "ü" * 200, "step": 3})
    (path.with_name(f".{path.name}-last-replaced-unfinished.partial")).mkdir()
    path.mkdir()
    assert path.is_dir()
