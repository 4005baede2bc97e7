"""The file with the last steps: what is read is what was written, whatever happened to its end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemologger.exact.trained_steps import TrainedSteps

MACHINE = "1 x cpu"


def read(path):
    return TrainedSteps(path, MACHINE).behind(0)


def written(path, count, kept=1000):
    steps = TrainedSteps(path, MACHINE, kept)
    for step in range(1, count + 1):
        steps.add(step, repr(step / 7))
    steps.close()
    return {step: repr(step / 7) for step in range(1, count + 1)}


def test_steps_outlive_their_writer(tmp_path):
    steps = TrainedSteps(tmp_path / "steps", MACHINE)
    steps.add(4, "0.5")
    steps.add(5, "nan")
    assert read(tmp_path / "steps") == {4: "0.5", 5: "nan"}
    assert TrainedSteps(tmp_path / "steps", "2 x cpu").found_on == MACHINE


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 30), kept=st.integers(1, 8), cut=st.integers(0, 400), tail=st.binary(max_size=6))
def test_a_torn_end_gives_fewer_steps_and_no_others(tmp_path_factory, count, kept, cut, tail):
    path = tmp_path_factory.mktemp("torn") / "steps"
    all_of_them = written(path, count, kept)
    assert len(read(path)) >= min(count, kept)
    path.write_bytes(path.read_bytes()[: -cut or None] + tail.replace(b"\n", b""))
    assert read(path).items() <= all_of_them.items()


def test_what_comes_again_takes_the_place_of_what_was(tmp_path):
    written(tmp_path / "steps", 5)
    steps = TrainedSteps(tmp_path / "steps", MACHINE)
    steps.add(3, "1.0")
    assert list(read(tmp_path / "steps").items())[1:] == [(2, repr(2 / 7)), (3, "1.0")]
    steps.forget_behind(1)
    assert list(read(tmp_path / "steps")) == [1]
    steps.remove()
    assert not list(tmp_path.iterdir())


def test_it_does_not_grow_without_end(tmp_path):
    written(tmp_path / "steps", 1000, kept=10)
    assert list(read(tmp_path / "steps")) == list(range(991 - len(read(tmp_path / "steps")) + 10, 1001))
    assert 10 <= len(read(tmp_path / "steps")) <= 20


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"machine", b"machine\nno step\n", b"machine\n3,1\n2,1\n"])
def test_any_content_can_be_read(content, tmp_path):
    (tmp_path / "steps").write_bytes(content)
    assert read(tmp_path / "steps") in ({}, {3: "1"})
