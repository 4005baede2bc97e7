"""Complex numbers, dates and the like as plain types and back."""

from __future__ import annotations

import io
from array import array
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import torch

from nemologger.checkpoint.state.plain import Encoder, decode
from nemologger.exact.values import contents, plain_contents


class Steps(int):
    def __new__(cls, *code_that_must_not_run):
        raise AssertionError


class Share(float):
    """A number of the program's own."""


class Phase(str):
    """A text of the program's own."""


class Named(str):
    by = "nobody"


def named(by):
    one = Named("a")
    one.by = by
    return one


VALUES = [
    int.__new__(Steps, 2**70), Share("nan"), Phase("warm up"),
    -0.0 + 1j, complex(float("nan"), float("inf")), Fraction(-1, 3), Decimal("NaN"), Decimal("-1E+500"), range(3, 9, 2),
    slice(None, 3), datetime(2026, 1, 2, 3, 4, 5, 6, fold=1),  # noqa: DTZ001
    datetime(2026, 1, 2, tzinfo=UTC),
    datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=-3))), date(2026, 1, 2), time(1, 2, fold=1), timedelta(-1, 3, 4),
    Path("a/b"), torch.Size([1, 2]), torch.bfloat16, array("d", [0.1]), array("H", [7]), array("b"), b"", b"\0b",
]  # fmt: skip


def through_a_file(plain):
    file = io.BytesIO()
    torch.save(Encoder().encode(plain), file)
    file.seek(0)
    return decode(torch.load(file, weights_only=True))


@pytest.mark.parametrize("value", VALUES, ids=map(repr, VALUES))
def test_through_a_file_that_runs_no_code_alone_and_in_a_long_list(value):
    plain, row = plain_contents.keep(value, [10_000]), plain_contents.keep([value] * 100 + [()], [100_000])
    back = plain_contents.unkept(through_a_file(plain))
    assert (type(back), repr(back), getattr(back, "fold", 0)) == (type(value), repr(value), getattr(value, "fold", 0))
    assert repr(plain_contents.unkept(through_a_file(row))) == repr([value] * 100 + [()])


def test_an_equal_one_has_not_changed():
    one, other = (
        [1j, Fraction(1, 3), date(2026, 1, 2), b"a" * 5000],
        [1j, Fraction(1, 3), date(2026, 1, 2), b"a" * 5000],
    )
    assert contents.fingerprint(one) == contents.fingerprint(other)
    assert [*map(contents.fingerprint, one)] == [*map(contents.fingerprint, other)]
    assert contents.fingerprint(Fraction(1, 3)) != contents.fingerprint(Fraction(1, 2))
    assert contents.fingerprint(b"a" * 5000) != contents.fingerprint(b"a" * 4999 + b"b")


def test_an_array_is_filled_where_it_is():
    present = array("d", [1.0])
    back = plain_contents.put_back(present, plain_contents.keep(array("d", [2.0, 3.0]), [1000]), same=True)
    assert back is present == array("d", [2.0, 3.0])


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 1, 2, tzinfo=ZoneInfo("UTC")),
        slice([1]),
        array("d", range(1000)),
        named("somebody"),
        type("Local", (int,), {"__module__": __name__})(1),
    ],
)
def test_what_has_more_to_it_or_too_much_is_not_kept(value):
    with pytest.raises(plain_contents.CannotBeKeptError):
        plain_contents.keep(value, [1000])


@pytest.mark.parametrize(
    "atom",
    [
        ["fraction", "1e999999999", 1],
        ["size", "a"],
        ["dtype", "os"],
        ["dtype", "load"],
        ["eval", "1"],
        ["array", "d", 9],
        ["of a class", "builtins:bool", 1],
        ["of a class", "collections:OrderedDict", {}],
    ],
)
def test_a_stranger_makes_nothing_else(atom):
    with pytest.raises((TypeError, ValueError, KeyError)):
        plain_contents.unkept({"atom": atom})


def test_a_class_that_is_no_number_or_text_stays_unknown():
    back = plain_contents.unkept({"atom": ["of a class", "builtins:eval", "1"]})
    assert (type(back), back) == (str, "1")


def test_equal_ones_of_a_class_that_is_not_found_by_name_are_the_same():
    local = type("Local", (str,), {"__module__": __name__})
    assert contents.fingerprint(local("a")) == contents.fingerprint(local("a")) != contents.fingerprint(local("b"))
