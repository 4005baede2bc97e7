"""What lists, dictionaries, arrays and tensors hold, as plain types and back."""

from __future__ import annotations

import os
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from nemologger.errors import RefusedError
from nemologger.exact.program.owned import Owned
from nemologger.exact.values import plain_contents
from nemologger.exact.values.tensors import leaves, moved, on_device


class Step(NamedTuple):
    reward: float
    state: Any


class Pair(Step):
    """Made of one value."""

    def __new__(cls, state: Any) -> Pair:
        return tuple.__new__(cls, (0.5, state))


VALUES: dict[str, Any] = {
    "ints": list(range(100)),
    "few ints": [3, 1],
    "numpy's": list(np.arange(100)),
    "floats": (0.1, 0.2),
    "mixed": [1, 0.5, "a", None, True, b"b"],
    "huge": [2**70, 1],
    "nested": [[1, 2], {"a": (3, {4})}, deque([5])],
    "empty": [],
    "dictionary": {1: "a", (2, 3): [4]},
    "set": {1, 2},
    "deque": deque([1, 2]),
    "kinds": {"lists": defaultdict(list, {"a": [1]}), "counts": Counter("aab"), "order": OrderedDict(a=1)},
    "window": {"losses": deque([0.5, 0.25], maxlen=2)},
    "named": Step(0.5, [1]),
    "named otherwise": Pair([1]),
    "named within": deque([(Step(0.5, None), Step(1.5, 2))], maxlen=3),
    "bytes": bytearray(b"abc"),
    "array": np.arange(6.0).reshape(2, 3),
    "view": np.arange(12)[::2],
    "dates": np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[D]"),
    "no array": np.zeros((0, 2)),
    "number": np.float32(3),
    "tensor": torch.arange(6).reshape(2, 3).t(),
    "bfloat16": torch.rand(3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "no tensor": torch.zeros(0, 2),
}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | np.generic | torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and a == b and list(map(type, a)) == list(map(type, b))


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_contents_through_a_file_that_runs_no_code(value, tmp_path):
    torch.save(plain_contents.keep(value, [1000]), tmp_path / "kept.pt")
    assert _same(plain_contents.unkept(torch.load(tmp_path / "kept.pt", weights_only=True)), value)


def test_a_copied_state_is_what_deepcopy_makes_of_it():
    numbers, tensor = [1, 2.5, "three", None], torch.arange(3)
    state = {
        "a": numbers,
        "b": [numbers, tensor, (4, [5])],
        6: {"t": tensor, "o": [SimpleNamespace(n=1)]},
        7: Pair(tensor),
    }
    state["all"] = state
    made = plain_contents.copied(state)
    numbers.append(7)
    tensor.add_(1)
    state["b"].clear()
    assert made["a"] == [1, 2.5, "three", None]
    assert made["b"][0] is made["a"]
    assert made["b"][1] is made[6]["t"]
    assert made[6]["t"].tolist() == [0, 1, 2]
    assert made["b"][2] == (4, [5])
    assert type(made[7]) is Pair
    assert made[7].state is made[6]["t"]
    assert made["all"] is made
    assert made[6]["o"] == [SimpleNamespace(n=1)]
    assert made[6]["o"][0] is not state[6]["o"][0]


class Named(dict):
    """What a program may ask for more than a dictionary can answer."""


@pytest.mark.parametrize("many", [1, 100])
def test_a_dictionary_within_is_of_its_kind_again(many):
    items = [{"lists": defaultdict(list), "windows": [deque([1], maxlen=1)]} for _ in range(many)]
    back = plain_contents.unkept(plain_contents.keep(items, [2**20]))
    for one in (back[0], moved(back[0], torch.device("cpu"), [0])):
        one["lists"]["new"].append(1)
        one["windows"][0].append(2)
        assert one["windows"][0] == deque([2])
    for stranger in (Named(a=1), defaultdict(lambda: 1)):
        with pytest.raises(plain_contents.CannotBeKeptError, match=f"holds {type(stranger).__name__} objects"):
            plain_contents.keep([[stranger]] * many, [2**20])
    assert plain_contents.unkept(plain_contents.keep(Named(a=1), [1000])) == {"a": 1}  # for what is there to be filled


def test_only_those_tensors_go_to_a_device_that_were_there():
    outputs = deque([{"loss": torch.ones(1, device="meta"), "seen": (1, torch.ones(2))}, torch.ones(3)], maxlen=4)
    outputs.append([torch.ones(4, device="meta")])
    assert on_device(outputs) == [0, 3]
    back = moved(
        deque([{"loss": torch.ones(1), "seen": (1, torch.ones(2))}, torch.ones(3), [torch.ones(4)]]), "meta", [0, 3]
    )
    assert [leaf.device.type for leaf in leaves(back) if isinstance(leaf, torch.Tensor)] == [
        "meta",
        "cpu",
        "cpu",
        "meta",
    ]


def test_tensors_of_a_long_list_are_made_where_they_were():
    kept = plain_contents.keep([[torch.arange(3)]] * 100, [2**20])
    with torch.device("meta"):
        back = plain_contents.unkept(kept)
    assert back[0][0].tolist() == [0, 1, 2]


def test_many_small_samples_are_kept_as_they_are_and_once():
    samples = [{"path": f"{i}.png", "box": (i, i + 1)} for i in range(3)]
    plain = plain_contents.keep(samples, [1000])
    assert plain["list"][1]["dict"]["values"] == ["1.png", {"tuple": [1, 2]}]  # an array for each would take 300 bytes
    assert plain_contents.unkept(plain) == samples
    kept: dict[int, Any] = {}
    first, second = (Owned({name: SimpleNamespace(samples=samples)}, kept=kept) for name in ("dataset", "loader"))
    assert first._first["dataset.samples"].kept is second._first["loader.samples"].kept


def test_a_long_list_is_one_row_of_bytes_through_a_file_that_runs_no_code(tmp_path):
    items = [[name, value] for name, value in VALUES.items()] * 5
    kept = plain_contents.keep(items, [2**20])
    assert [*kept["list"]] == ["rows"]
    torch.save(kept, tmp_path / "kept.pt")
    back = plain_contents.unkept(torch.load(tmp_path / "kept.pt", weights_only=True))
    assert [name for name, _ in back] == [name for name, _ in items]
    assert all(_same(ours, given) for (_, ours), (_, given) in zip(back, items, strict=True))
    assert back[0][1] is not items[0][1]


@pytest.mark.parametrize("many", [1, 100])
def test_a_tuple_with_names_is_a_plain_one_where_its_class_is_gone(many, monkeypatch):
    kept = plain_contents.keep([Step(0.5, torch.ones(1))] * many, [2**20])
    back = plain_contents.unkept(kept)
    assert type(moved(back, torch.device("cpu"), [0])[0]) is Step
    monkeypatch.delitem(globals(), "Step")
    assert type(plain_contents.unkept(kept)[0]) is tuple


def test_a_tuple_whose_class_cannot_be_found_by_its_name_is_not_kept():
    class Step(NamedTuple):
        reward: float

    for items in ([Step(0.5)], [[Step(0.5)]] * 100):
        with pytest.raises(plain_contents.CannotBeKeptError, match="holds Step objects"):
            plain_contents.keep(items, [2**20])


@pytest.mark.parametrize(
    "tensors",
    [[torch.rand(()) for _ in range(100)], deque(torch.rand(100, 2, requires_grad=True).unbind(), maxlen=100)],
)
def test_a_long_list_of_tensors_that_are_alike_is_one_tensor(tensors, tmp_path):
    left = [2000]
    torch.save(plain_contents.keep({"losses": tensors}, left), tmp_path / "kept.pt")
    assert left[0] > 0  # to write each would take more
    back = plain_contents.unkept(torch.load(tmp_path / "kept.pt", weights_only=True))["losses"]
    assert type(back) is type(tensors)
    assert all(_same(ours, given) for ours, given in zip(back, tensors, strict=True))
    back[0].zero_()
    assert back[1].all()
    other = [*tensors, torch.zeros(3)]
    assert _same(plain_contents.unkept(plain_contents.keep(other, [2**20]))[-1], other[-1])


def test_a_long_list_of_other_things_or_too_many_is_not_kept():
    left = [1000]
    for items, why in (([[object()]] * 100, "holds object objects"), ([[1, "text" * 100]] * 1000, "is too large")):
        with pytest.raises(plain_contents.CannotBeKeptError, match=why):
            plain_contents.keep([item[:] for item in items], left)
    assert left == [1000]


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("item", [Runs(), os.system, SimpleNamespace(a=1)], ids=["call", "function", "object"])
def test_a_row_of_a_stranger_runs_nothing(item, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = torch.frombuffer(bytearray(pickle.dumps([item])), dtype=torch.uint8)
    with pytest.raises(RefusedError, match="which none needs"):
        plain_contents.unkept({"list": {"rows": row}})
    assert not list(tmp_path.iterdir())
