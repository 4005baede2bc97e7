"""Plain types of a stranger: what comes back of ``common.pt`` runs nothing, and sets nothing that it may not."""

from __future__ import annotations

import runpy  # noqa: F401  a module that a stranger might name
import subprocess  # noqa: F401  and another
import sys
from dataclasses import dataclass

import pytest

from nemologger.checkpoint.state.plain import TAG, Encoder, decode


@dataclass
class Schedule:
    warmup: int

    def __post_init__(self):
        if self.warmup < 0:
            raise AssertionError("the constructor ran")


@dataclass(frozen=True)
class Point:
    x: int
    y: int


class Stranger:
    """Has no plain form."""


def test_no_constructor_runs():
    encoded = Encoder().encode(Schedule(warmup=3))
    encoded["value"]["warmup"] = -1
    assert decode(encoded).warmup == -1


def test_only_fields_of_a_dataclass_are_set():
    encoded = Encoder().encode(Point(1, 2))
    encoded["value"]["__class__"] = {TAG: "name", "value": f"{__name__}:Stranger"}
    encoded["value"]["extra"] = 3
    back = decode(encoded)
    assert type(back) is Point
    assert vars(back) == {"x": 1, "y": 2}


@pytest.mark.parametrize("kind", ["name", "dataclass", "enum", "namedtuple"])
@pytest.mark.parametrize("name", ["this:d", "antigravity:webbrowser", "nemologger:NeMoLogger", "torch:_inductor", "x"])
def test_decoding_imports_nothing(kind, name):
    """Neither a module that is named, nor what a module imports when it is asked for an attribute."""
    before = set(sys.modules)
    decode({TAG: kind, "class": name, "name": "a", "value": name if kind == "name" else []})
    assert set(sys.modules) - before == set()


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "posix:system",
        "subprocess:getoutput",
        "builtins:eval",
        "builtins:exec",
        "runpy:run_path",
        "os:environ",
        "nemologger.checkpoint.state.plain:sys",
        "nemologger.checkpoint.state.plain:_DECODERS",
    ],
)
def test_a_strangers_name_stays_a_string(name):
    """Functions of the standard library, objects, and what a module has only imported are never handed out."""
    assert name.partition(":")[0] in sys.modules
    assert decode({TAG: "name", "value": name}) == name


def test_decoding_calls_nothing(monkeypatch):
    called = []

    class Trap(type):
        def __call__(cls, *args, **kwargs):
            called.append(cls)

        def __getattr__(cls, name):
            called.append(name)
            raise AttributeError(name)

    class Bait(metaclass=Trap):
        pass

    Bait.__qualname__ = "Bait"
    monkeypatch.setattr(sys.modules[__name__], "Bait", Bait, raising=False)
    for kind in ("dataclass", "enum", "namedtuple"):
        decode(
            {
                TAG: kind,
                "class": f"{__name__}:Bait.gone",
                "name": "a",
                "value": {"a": 1} if kind != "namedtuple" else [1],
            }
        )
    assert decode({TAG: "name", "value": f"{__name__}:Bait"}) is Bait
    assert not [name for name in called if name not in ("_fields", "__dataclass_fields__")]


@pytest.mark.parametrize("value", [{TAG: "from the future", "value": 1}, {TAG: "left out", "class": "x"}])
def test_an_unknown_tag_is_none(value):
    assert decode(value) is None
