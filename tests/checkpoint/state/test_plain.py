"""Plain types: everything a state holds goes to ``common.pt`` and comes back."""

from __future__ import annotations

import io
import math
import pathlib
import pickle
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta, timezone
from enum import Enum, Flag, IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemologger.checkpoint.state.plain import TAG, Encoder, decode


class Color(Enum):
    RED = 1
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Access(Flag):
    READ = 1
    WRITE = 2


@dataclass
class Schedule:
    warmup: int = 0
    path: Path = Path("x")
    inner: object = None
    computed: int = field(init=False, default=7)

    def __post_init__(self):
        if self.warmup < 0:
            raise AssertionError("the constructor ran")


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


Pair = namedtuple("Pair", "first second")


class Stranger:
    """Has no plain form."""


class Counting(dict):
    """A mapping of somebody's own."""


def a_function(x):
    return x


def saved(value):
    """``value`` through ``common.pt``: encoded, saved, loaded without trust, decoded."""
    encoder = Encoder()
    buffer = io.BytesIO()
    torch.save(encoder.encode(value), buffer)
    buffer.seek(0)
    return decode(torch.load(buffer, weights_only=True)), encoder.left_out


def same(a, b) -> bool:
    """Equal in value and in type, nan included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, key) and same(v, w) for (k, v), (key, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Namespace):
        return same(vars(a), vars(b))
    if isinstance(a, Schedule):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(Schedule))
    return a == b


finite = st.floats(allow_nan=False)
hashables = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    finite,
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from([*Color, *Level, Access.READ, Access.READ | Access.WRITE, Point(1, 2)]),
    st.text(st.characters(categories=["L"]), min_size=1, max_size=5).map(Path),
    st.timedeltas(),
    st.datetimes(),
    st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))])),
    st.dates(),
    st.sampled_from([torch.float32, torch.uint16, torch.device("cpu"), torch.Size([2, 3]), Path, Schedule, a_function]),
)


@st.composite
def _key(draw):
    return draw(st.one_of(hashables, st.tuples(hashables, hashables)))


keys = _key()
leaves = st.one_of(
    hashables,
    st.floats(),
    st.complex_numbers(),
    st.integers(min_value=10**300, max_value=10**320),
    st.sampled_from(
        [np.float32(1.5), np.int8(-3), np.bool_(True), np.str_("text"), np.str_(""), np.datetime64("2026-01-02")]
    ),
    st.sampled_from(
        [
            np.arange(6.0).reshape(2, 3),
            np.arange(6, dtype=">i2").reshape(2, 3).T,
            np.zeros((0, 3)),
            np.array(5, dtype=np.uint8),
            np.array(["a", "bcd"]),
            np.array([]),
            np.arange(6000, dtype=">i2").reshape(60, 100).T,
            np.array(["a", "bcd"] * 1000),
            np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i1"), ("b", "f8")]),
            np.array([(1, [2, 3])] * 600, dtype=np.dtype([("a", "i1"), ("b", "f8", 2)], align=True)),
            np.array([(1, 2.5)], dtype=[("a", "i1"), ("b", "f8")])[0],
        ]
    ),
    st.sampled_from([b"x" * 5000, bytearray(b"y" * 5000)]),
    st.sampled_from(
        [range(2, 9, 3), slice(1, None), bytearray(b"ab"), torch.arange(4), torch.tensor(2.5), torch.ones(0)]
    ),
)


@st.composite
def _leaf(draw):
    return draw(leaves)


values = st.recursive(
    _leaf(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.just(TAG), inner, max_size=1),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
        st.lists(inner, max_size=3).map(lambda items: deque(items, maxlen=5)),
        st.dictionaries(st.sampled_from(["a", "b"]), inner).map(lambda items: Namespace(**items)),
        st.dictionaries(keys, inner, max_size=2).map(lambda items: defaultdict(list, items)),
        st.builds(Schedule, warmup=st.integers(0, 5), inner=inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_everything_comes_back_as_it_was(value):
    back, left_out = saved(value)
    assert same(back, value)
    assert left_out == {}


def test_config_objects_come_back():
    config = OmegaConf.create({"lr": 0.1, "layers": [1, 2], "name": "${lr}", "unset": "???"})
    back, _ = saved({"config": config, "list": config.layers})
    assert OmegaConf.to_container(back["config"], resolve=False) == OmegaConf.to_container(config, resolve=False)
    assert type(back["config"]) is type(config)
    assert list(back["list"]) == [1, 2]


def test_subclasses_of_plain_types_come_back_as_the_plain_type():
    class Name(str):
        pass

    class Ratio(float):
        pass

    class Rows(list):
        pass

    back, left_out = saved({"name": Name("x"), "ratio": Ratio(0.5), "rows": Rows([Path("a")]), "own": Counting(a=1)})
    assert same(back, {"name": "x", "ratio": 0.5, "rows": [Path("a")], "own": {"a": 1}})
    assert not left_out
    assert saved(Counter("aab"))[0] == Counter("aab")


def test_tensors_of_any_kind_come_back():
    tensors = {
        "sparse": torch.eye(3).to_sparse(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2, dtype=torch.float8_e4m3fn),
        "needs grad": torch.ones(2, requires_grad=True) * 2,
    }
    back, left_out = saved(tensors)
    assert not left_out
    assert torch.equal(back["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(back["conjugate"], torch.tensor([1 - 2j]))
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in back.values())
    assert torch.equal(back["half"].float(), torch.ones(2))


def test_a_view_does_not_drag_its_storage_along():
    storage = torch.zeros(100_000)
    buffer = io.BytesIO()
    torch.save(Encoder().encode({"view": storage[:2], "column": storage.view(1000, 100)[:, 0]}), buffer)
    assert len(buffer.getvalue()) < 10_000


@pytest.mark.parametrize(
    "kind", [bytes, bytearray, lambda data: np.frombuffer(data, ">u4")], ids=["bytes", "bytearray", "array"]
)
def test_many_bytes_take_no_more_space_than_they_are(kind):
    value = kind(b"\xfe\xff" * 100_000)
    buffer = io.BytesIO()
    torch.save(Encoder().encode({"value": value}), buffer)
    assert len(buffer.getvalue()) < 203_000
    assert same(saved(value)[0], value)


def test_an_array_that_came_back_can_be_written_to_and_is_its_own():
    array = np.zeros(5000, np.uint8)
    encoded = Encoder().encode(array)
    decode(encoded)[:] = 1
    assert not array.any()


def test_fields_in_another_order_in_memory_come_back_by_name():
    dtype = np.dtype({"names": ["a", "b"], "formats": ["i4", "f4"], "offsets": [4, 0]})
    back, left_out = saved(np.array([(1, 2.5), (3, 4.5)], dtype))
    assert back["a"].tolist() == [1, 3]
    assert back["b"].tolist() == [2.5, 4.5]
    assert left_out == {}


def test_what_has_no_plain_form_is_named_and_the_rest_is_kept():
    value = {
        "good": 1,
        "callbacks": {"mine": [Stranger(), 2]},
        "a lambda": lambda: 0,
        "a method": "".join,
        "stdlib": math.sqrt,
        ("key", Stranger()): 3,
        "meta": torch.empty(2, device="meta"),
    }
    back, left_out = saved(value)
    assert back["good"] == 1
    assert back["callbacks"] == {"mine": [None, 2]}
    assert back["stdlib"] is None
    assert set(left_out) >= {"['callbacks'].mine[0]", "['a lambda']", "['a method']", "['stdlib']", "['meta']"}
    assert any("Stranger has no plain form" in why for why in left_out.values())
    assert "no values" in left_out["['meta']"]
    assert any(path.startswith("key ('key'") or " key (" in path for path in left_out)


def test_what_refers_to_itself_is_named():
    knot: dict = {"a": 1}
    knot["self"] = knot
    shared = [1]
    back, left_out = saved({"knot": knot, "twice": [shared, shared]})
    assert back == {"knot": {"a": 1, "self": None}, "twice": [[1], [1]]}
    assert list(left_out) == ["knot.self"]
    assert "refers to itself" in left_out["knot.self"]


def test_a_class_that_the_program_does_not_know_leaves_its_plain_value():
    encoded = Encoder().encode(
        {
            "e": Color.RED,
            "d": Point(1, 2),
            "set": {Point(3, 4)},
            "keys": {Point(5, 6): 1},
            "pair": Pair(1, 2),
            "c": Color,
        }
    )
    text = pickle.dumps(encoded).replace(__name__.encode(), b"x" * len(__name__))
    back = decode(pickle.loads(text))
    assert back["e"] == "RED"
    assert back["d"] == {"x": 1, "y": 2}
    assert back["set"] == {(("x", 3), ("y", 4))}
    assert back["keys"] == {(("x", 5), ("y", 6)): 1}
    assert same(back["pair"], (1, 2))
    assert back["c"] == f"{'x' * len(__name__)}:Color"


def test_an_enum_member_that_is_gone_leaves_its_name():
    encoded = {**Encoder().encode(Color.RED), "name": "GREEN"}
    assert decode(encoded) == "GREEN"


def test_plain_values_are_left_as_they_are():
    """The most common state costs nothing: no tags, no copies of leaves."""
    state = {"lr": 0.1, "betas": (0.9, 0.99), "names": ["a"], 3: None}
    assert Encoder().encode(state) == state


def test_numpy_objects_become_lists():
    back, _ = saved({"objects": np.array([1, "a", None], dtype=object)})
    assert back == {"objects": [1, "a", None]}


def test_random_states_come_back():
    import random

    states = {
        "python": random.getstate(),
        "numpy": np.random.RandomState(3).get_state(),
        "torch": torch.get_rng_state(),
    }
    back, left_out = saved(states)
    assert not left_out
    random.setstate(back["python"])
    np.random.RandomState().set_state(back["numpy"])
    assert same(back["torch"], states["torch"])


def test_dates_keep_their_zone():
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
    back, _ = saved([moment, date(2026, 1, 2), timedelta(days=-1, microseconds=1), pathlib.PurePosixPath("a")])
    assert back == [moment, date(2026, 1, 2), timedelta(days=-1, microseconds=1), Path("a")]
    assert back[0].utcoffset() == timedelta(0)


def test_proxies_and_keys_that_cannot_be_printed_are_left_out_and_the_rest_is_there():
    class Proxy:
        @property
        def __class__(self):
            raise RuntimeError("has nothing yet to stand for")

    class IsNoTensor:
        __class__ = torch.Tensor

    class Key:
        def __repr__(self):
            raise RuntimeError

    encoder = Encoder()
    plain = encoder.encode({"proxy": Proxy(), "lies": IsNoTensor(), "keys": {Key(): 1}, "kept": 2})
    assert decode(plain)["kept"] == 2
    assert [path.partition(" ")[0] for path in encoder.left_out] == ["proxy", "lies", "keys"]
