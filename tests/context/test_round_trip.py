"""Writing a context and making its objects again."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import errno
import fractions
import functools
import json
import math
import pathlib
import types
import uuid
import warnings

import ctxmod
import fiddle as fdl
import numpy as np
import pytest
import torch
from ctxmod import Access, Anything, Cfg, Color, Data, Model, Part, Point, SubCfg
from fiddle.experimental import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemologger.disk import LocalDisk
from nemologger.errors import ContextError, NotFoundError
from nemologger.io import IOMixin, Uncaptured, load_context

VALUES = {
    "path": pathlib.Path("a/b"),
    "pure path": pathlib.PurePosixPath("c"),
    "timedelta": datetime.timedelta(days=-1, hours=3, microseconds=5),
    "datetime": datetime.datetime(2020, 1, 1, 5, tzinfo=datetime.UTC),
    "naive datetime": datetime.datetime(2020, 1, 1, 5),  # noqa: DTZ001
    "date": datetime.date(2020, 2, 3),
    "enum": Color.RED,
    "flags": Access.READ | Access.WRITE,
    "tuple keys": {(1, "a"): "x", Color.BLUE: 3, None: 4, 2.5: 5},
    "path keys": {pathlib.Path("k"): 1},
    "set": {3, 1},
    "frozenset": frozenset({"a"}),
    "set of paths": {pathlib.Path("k")},
    "size": torch.Size([2, 3]),
    "device": torch.device("cuda:1"),
    "bytes": b"\x00\xff\n",
    "bytearray": bytearray(b"ab"),
    "complex": 1 + 2j,
    "range": range(1, 9, 2),
    "slice": slice(1, None),
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": collections.Counter("aab"),
    "namespace": argparse.Namespace(a=[1]),
    "simple namespace": types.SimpleNamespace(b=2),
    "decimal": decimal.Decimal("1.10"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "numpy scalar": np.float64(0.5),
    "dtype": torch.bfloat16,
    "layout": torch.strided,
    "memory format": torch.channels_last,
    "builtin function": torch.relu,
    "builtin of functional": torch.nn.functional.gelu,
    "function": torch.nn.init.ones_,
    "class": torch.optim.SGD,
    "type": int,
    "own function": ctxmod.scaled,
    "infinity": math.inf,
    "large": 10**30,
    "text": "naïve \ud800 \x00",
    "named tuple": Point(1, (2, [3])),
    "dataclass": SubCfg(heads=9),
    "omegaconf": OmegaConf.create({"a": 1, "b": "${a}"}),
    "nested": [({"a": [None, True]},)],
}


def test_every_kind_of_argument_comes_back_equal_here_and_in_plain_fiddle(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Anything(**VALUES).io_dump(tmp_path)
        here = load_context(tmp_path).kwargs
    there = fdl.build(serialization.load_json((tmp_path / "io.json").read_text())).kwargs

    for name, value in VALUES.items():
        assert here[name] == value, name
        assert there[name] == value, name
        assert type(here[name]) is type(value) or isinstance(value, np.generic), name


def test_small_tensors_and_arrays_come_back(tmp_path):
    tensor, array = torch.tensor([[1.0, math.nan]], dtype=torch.bfloat16), np.arange(6, dtype=np.int16).reshape(2, 3)
    Anything(tensor, array).io_dump(tmp_path)
    again = load_context(tmp_path)
    assert torch.equal(again.args[0].nan_to_num(9), tensor.nan_to_num(9))
    assert again.args[0].dtype is torch.bfloat16
    assert np.array_equal(again.args[1], array)
    assert again.args[1].dtype == np.int16


def test_partials_come_back_callable(tmp_path):
    Anything(functools.partial(ctxmod.scaled, k=3), functools.partial(ctxmod.scaled, 3)).io_dump(tmp_path)
    by_name, by_place = load_context(tmp_path).args
    assert by_name(2) == 6
    assert by_place(5) == 15


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.tuples(st.integers()), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(plain)
def test_any_plain_value_comes_back_equal(tmp_path_factory, value):
    directory = tmp_path_factory.mktemp("context")
    Anything(value).io_dump(directory)
    assert load_context(directory).args[0] == value


def test_nested_objects_come_back_and_sharing_is_kept(tmp_path):
    part = Part(ctxmod.scaled)
    Model(Cfg(dim=3), parts=[part, {"again": part}]).io_dump(tmp_path)
    again = load_context(tmp_path)
    assert again.config == Cfg(dim=3)
    assert again.parts[0] is again.parts[1]["again"]
    assert again.parts[0].fn is ctxmod.scaled


def test_plain_fiddle_reads_a_whole_context(tmp_path):
    Model(Cfg(dtype=torch.bfloat16), optim=functools.partial(torch.optim.Adam, lr=0.1)).io_dump(tmp_path)
    config = serialization.load_json((tmp_path / "io.json").read_text())
    assert isinstance(config, fdl.Config)
    assert isinstance(fdl.build(config), Model)
    assert set(json.loads((tmp_path / "io.json").read_text())) == {"root", "objects", "refcounts", "version"}


def test_one_argument_that_cannot_be_written_is_named_and_the_rest_is_kept(tmp_path):
    model = Model(Cfg(dim=3), parts=[1, ctxmod.Plain(), (lambda: 1)], name="kept")
    with pytest.warns(UserWarning, match="does not hold everything that was passed") as caught:
        model.io_dump(tmp_path)
    said = str(caught[0].message)
    assert len(caught) == 1
    assert "parts[1] (ctxmod.Plain): its constructor arguments were not captured; let its class inherit" in said
    assert "parts[2] (function): " in said

    config = load_context(tmp_path, build=False)
    assert config.config.dim == 3
    assert fdl.get_callable(config.parts[1]) is Uncaptured
    with pytest.warns(UserWarning, match=r"left out:\n  - parts\[1\]: ctxmod.Plain: its constructor"):
        again = load_context(tmp_path)
    assert again.parts == [1]
    assert again.name == "kept"


def test_many_values_of_a_class_are_named_in_one_line(tmp_path):
    model = Model(Cfg(), parts=[ctxmod.Plain(), 1, ctxmod.Plain(), (lambda: 1), ctxmod.Plain()])
    with pytest.warns(UserWarning, match="does not hold everything that was passed") as caught:
        model.io_dump(tmp_path)
    _, plain, function = str(caught[0].message).splitlines()
    assert plain.startswith("  - parts[0] and 2 more (ctxmod.Plain): its constructor arguments were not captured")
    assert function.startswith("  - parts[3] (function): ")


def test_the_same_loss_is_said_once_per_object(tmp_path):
    model = Model(Cfg(), parts=[ctxmod.Plain()])
    with pytest.warns(UserWarning, match="does not hold everything"):
        model.io_dump(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.io_dump(tmp_path)


def test_a_needed_argument_that_was_lost_is_an_error_when_built(tmp_path):
    with pytest.warns(UserWarning, match="fn"):
        Part(ctxmod.Plain()).io_dump(tmp_path)
    with pytest.raises(ContextError, match=r"fn was not kept: ctxmod.Plain: .*Load with build=False"):
        load_context(tmp_path)
    config = load_context(tmp_path, build=False)
    config.fn = 3
    assert fdl.build(config).fn == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"fn": 3, "m": 2}, "has no argument 'm' any more, but fn, n"), ({"n": 2}, "needs an argument 'fn', which")],
)
def test_a_class_that_takes_other_arguments_today_is_named(tmp_path, arguments, said):
    Anything(**arguments).io_dump(tmp_path)
    file = tmp_path / "io.json"
    file.write_text(file.read_text().replace("Anything", "Part"))
    with pytest.raises(ContextError, match=f"{tmp_path}: the whole is ctxmod.Part, which {said}.*build=False"):
        load_context(tmp_path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(5000), "only plain tensors of at most 1000 values"),
        (torch.nn.Linear(1, 1), r"call nemologger.io.track_io\(Linear\)"),
        (np.array(["a"]), "only numpy arrays of at most 1000 numbers"),
        (list(range(20_000)), "it has 20000 items"),
        (open, "a function written in C"),
        (type("Local", (), {}), "cannot be found by its name"),
        (iter([]), "cannot be written as JSON"),
        (ctxmod.Forgetful(1), r"or call self.save_hyperparameters\(\) in it"),
    ],
)
def test_a_loss_says_why(value, reason, tmp_path):
    with pytest.warns(UserWarning, match=reason):
        Anything(value, 1).io_dump(tmp_path)
    assert load_context(tmp_path, build=False)[1] == 1


def test_what_contains_itself_is_lost_and_not_followed(tmp_path):
    endless = [1]
    made = Anything(endless)
    endless.append(endless)
    made.__io__[0].append(made.__io__[0])
    with pytest.warns(UserWarning, match="it contains itself"):
        made.io_dump(tmp_path)


def test_a_second_dump_replaces_the_first(tmp_path):
    Model(Cfg(dim=1)).io_dump(tmp_path, yaml_attrs=["config"])
    first = sorted(p.name for p in tmp_path.iterdir())
    Model(Cfg(dim=2)).io_dump(tmp_path, yaml_attrs=["config"])
    assert load_context(tmp_path, "config.dim") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == first == ["config.yaml", "io.json"]


class FailingDisk(LocalDisk):
    """Fails at its n-th call, as a disk that is full."""

    def __init__(self, good_calls: int) -> None:
        self.left = good_calls

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "no space left on device")

    def make_directory(self, path):
        self._count()
        super().make_directory(path)

    def write(self, path, parts):
        self._count()
        super().write(path, parts)

    def remove(self, path):
        self._count()
        super().remove(path)

    def sync(self, directory):
        self._count()
        super().sync(directory)


def test_a_disk_that_fails_at_any_call_leaves_the_old_context_or_none(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("new")
    old = tmp_path / "old.txt"
    old.write_text("old")
    for good_calls in range(100):
        directory = tmp_path / str(good_calls)
        ctxmod.Tok(str(old), lower=False).io_dump(directory)
        try:
            ctxmod.Tok(str(vocabulary)).io_dump(directory, ["vocab_file"], disk=FailingDisk(good_calls))
        except OSError:
            if (directory / "io.json").exists():
                again = load_context(directory)
                assert pathlib.Path(again.vocab_file).read_text() == ("old" if not again.lower else "new")
            else:
                with pytest.raises(NotFoundError):
                    load_context(directory)
            assert not list(directory.glob("*.partial"))
            continue
        assert pathlib.Path(load_context(directory).vocab_file).read_text() == "new"
        return
    pytest.fail("the dump never succeeded")


def test_an_argument_that_is_asked_for_as_yaml_must_be_there_and_nothing_is_touched(tmp_path):
    Part(1).io_dump(tmp_path)
    with pytest.raises(ContextError, match="names 'modle', but the arguments that were passed are: fn"):
        Part(2).io_dump(tmp_path, yaml_attrs=["modle"])
    assert load_context(tmp_path).fn == 1


def test_an_object_whose_capture_failed_says_so_when_it_is_dumped(tmp_path):
    class Odd(IOMixin):
        def __init__(self, x):
            self.x = x

    class Rude:
        def __eq__(self, other):
            raise KeyError("no")

        @property
        def __class__(self):
            raise ZeroDivisionError("who asks")

    made = Odd(Rude())
    assert made.x is not None
    with pytest.raises(ContextError, match="Odd cannot be written: could not be captured: ZeroDivisionError: who asks"):
        made.io_dump(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("subpath", "expected"),
    [
        ("config.dim", 5),
        ("config['dim']", 5),
        ("parts[1][0]", "b"),
        ("parts.0", "a"),
        ("betas", (1, 2)),
        ("config.sub.tags[-1]", None),
    ],
)
def test_a_part_of_a_context_can_be_loaded(subpath, expected, tmp_path):
    Model(Cfg(dim=5), parts=["a", ["b"]], betas=(1, 2)).io_dump(tmp_path)
    if expected is None:
        with pytest.raises(ContextError, match=r"has nothing at 'config.sub'; at 'config' there is: dim"):
            load_context(tmp_path, subpath)
    else:
        assert load_context(tmp_path, subpath) == expected


def test_a_subpath_that_cannot_be_read_says_from_where(tmp_path):
    Part(1).io_dump(tmp_path)
    with pytest.raises(ContextError, match=r"from '\[n' on; write it as 'model.config'"):
        load_context(tmp_path, "fn[n")


def test_what_is_outside_of_the_subpath_is_not_looked_up(tmp_path):
    Anything(Data(seq_length=3), Part(1)).io_dump(tmp_path)
    text = (tmp_path / "io.json").read_text().replace('"name": "Part"', '"name": "Gone"')
    (tmp_path / "io.json").write_text(text)
    assert load_context(tmp_path, "0").seq_length == 3
    with pytest.raises(
        ContextError, match=r"\[1\] is ctxmod.Gone, which does not exist here: module ctxmod has no 'Gone'"
    ):
        load_context(tmp_path)


def test_a_checkpoint_or_its_weights_lead_to_the_context(tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step=5"
    (checkpoint / "weights").mkdir(parents=True)
    Part(1).io_dump(checkpoint / "context")
    for path in (checkpoint, str(checkpoint), checkpoint / "weights", checkpoint / "context"):
        assert load_context(path).fn == 1
    with pytest.raises(NotFoundError, match=r"run is a directory without io.json .*checkpoints have one: step=5"):
        load_context(run)
    with pytest.raises(NotFoundError, match="does not exist"):
        load_context(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="is a file, which has no"):
        load_context(checkpoint / "context" / "io.json")


def test_a_missing_class_leaves_a_placeholder_when_not_built(tmp_path):
    Anything(Part(1), 2).io_dump(tmp_path)
    text = (tmp_path / "io.json").read_text().replace('"name": "Part"', '"name": "Gone"')
    (tmp_path / "io.json").write_text(text)
    with pytest.warns(UserWarning, match="some entries are placeholders"):
        config = load_context(tmp_path, build=False)
    assert config[1] == 2
    assert config[0].fn == 1
    assert "placeholder for ctxmod.Gone" in repr(config)
    with pytest.raises(ContextError, match=r"ctxmod\.Gone"):
        fdl.build(config)
