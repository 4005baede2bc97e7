"""What a checkpoint holds: tensors under flat keys, the rest as plain types, and back again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engine import lightning_state, save
from torch.distributed.checkpoint import load as dcp_load
from torch.testing._internal.two_tensor import TwoTensor

from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.reading.load import load_checkpoint, load_model
from nemologger.checkpoint.state.snapshot import OtherWeights, Snapshot, check_form, restore, take
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import LocalDisk
from nemologger.errors import CheckpointError
from nemologger.ranks import SingleProcess

FIXTURES = Path(__file__).parents[2] / "fixtures"


class Phase(Enum):
    WARMUP = 1


@dataclass
class Progress:
    ready: int = 0


def there_and_back(state: dict, path: Path, **names) -> dict:
    """Through the files."""
    Saver(LocalDisk(), SingleProcess()).save(take(state, **names), path / "a", Manifest(step=1, epoch=0))
    return load_checkpoint(path / "a")


def assert_equal(found, wanted, where: str = "") -> None:
    assert type(found) is type(wanted) or isinstance(wanted, torch.Tensor), where
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for number, item in enumerate(wanted):
            assert_equal(found[number], item, f"{where}[{number}]")
    else:
        assert found == wanted, where


def test_lightnings_dictionary_comes_back(tmp_path):
    state = {
        **lightning_state(3),
        "callbacks": {"Mine": {"path": Path("a"), "phase": Phase.WARMUP, "scores": [torch.tensor(0.5)]}},
        "loops": {"fit_loop": {"progress": Progress(4)}},
        "hyper_parameters": {"lr": 0.1, ("a", 1): "tuple key"},
    }
    assert_equal(there_and_back(copy.deepcopy(state), tmp_path), state)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "Adagrad", "LBFGS", "Adafactor", "ASGD"])
def test_optimizers_go_on_as_if_nothing_had_been(tmp_path, optimizer):
    """The integer keys of their state survive; else it would be lost in silence."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        options = {"momentum": 0.9} if optimizer == "SGD" else {}
        return model, getattr(torch.optim, optimizer)(model.parameters(), lr=0.01, **options)

    def step(model, made) -> None:
        def closure():
            made.zero_grad()
            loss = model(torch.arange(12.0).reshape(4, 3)).square().mean()
            loss.backward()
            return loss

        made.step(closure)

    straight, optimizer_a = make()
    for _ in range(3):
        step(straight, optimizer_a)
    names = [{i: name for i, (name, _) in enumerate(straight.named_parameters())}]
    state = {"state_dict": straight.state_dict(), "optimizer_states": [optimizer_a.state_dict()]}
    loaded = there_and_back(state, tmp_path, optimizer_names=names)
    resumed, optimizer_b = make()
    resumed.load_state_dict(loaded["state_dict"])
    optimizer_b.load_state_dict(loaded["optimizer_states"][0])
    assert_equal(optimizer_b.state_dict(), optimizer_a.state_dict())
    step(straight, optimizer_a)
    step(resumed, optimizer_b)
    assert_equal(resumed.state_dict(), straight.state_dict())


def test_optimizer_state_is_kept_under_the_names_of_parameters():
    taken = take(lightning_state(1), optimizer_names=[{0: "layer.weight", 1: "layer.bias"}])
    assert "optimizer.0.state.layer.weight.exp_avg" in taken.tensors
    assert taken.paths["optimizer.0.state.layer.weight.exp_avg"] == (
        "optimizer",
        "0",
        "state",
        "layer.weight",
        "exp_avg",
    )
    assert "optimizer.0.state.1.exp_avg" in take(lightning_state(1)).tensors


def test_no_tensor_is_copied():
    state = lightning_state(1)
    taken = take(state)
    assert taken.tensors["state_dict.layer.weight"] is state["state_dict"]["layer.weight"]
    assert taken.nbytes == sum(tensor.nbytes for tensor in taken.tensors.values())


def test_buffers_are_rank_zeros():
    taken = take(lightning_state(1), parameter_names=frozenset({"layer.weight", "layer.bias"}))
    assert taken.rank_zero == {"state_dict.count"}
    assert take(lightning_state(1)).rank_zero == frozenset()


def test_whether_there_is_an_optimizer():
    state = lightning_state(1)
    assert take(state).has_optimizer
    del state["optimizer_states"]
    assert not take(state).has_optimizer


def test_extra_state_of_modules_comes_back(tmp_path):
    state = {"state_dict": {"w": torch.ones(2), "m._extra_state": {"scale": 3, "phase": Phase.WARMUP}, "none": None}}
    loaded = there_and_back(state, tmp_path)
    assert_equal(loaded, state)
    assert_equal(load_model(tmp_path / "a"), state["state_dict"])


def test_sparse_and_quantized_tensors_come_back(tmp_path):
    whole = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    packed = torch.ao.nn.quantized.dynamic.Linear(3, 3).state_dict()
    state = {"state_dict": {"sparse": torch.eye(3).to_sparse(), "dense": torch.eye(3), "whole": whole, **packed}}
    check_form(state["state_dict"])
    loaded = there_and_back(state, tmp_path)["state_dict"]
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))
    assert loaded["sparse"].is_sparse
    assert torch.equal(loaded["whole"], whole)
    (weight, _), (stored, _) = packed["_packed_params._packed_params"], loaded["_packed_params._packed_params"]
    assert torch.equal(stored, weight)


def test_tensors_deep_in_an_optimizers_state_come_back(tmp_path):
    """Some optimizers nest, in dictionaries with keys of any kind, in lists, and beside ``state``."""
    nested = {
        "state": {
            0: {
                "blocks": {"left": torch.ones(2), 3: torch.zeros(3)},
                "list": [torch.ones(1), 2],
                (0, 1): torch.ones(4),
            },
            1: {Phase.WARMUP: torch.ones(5), "kind": Phase.WARMUP},
        },
        "param_groups": [{"lr": torch.tensor(0.1), "params": [0, 1], "foreach": None}],
        "defaults": {"phase": Phase.WARMUP},
    }
    loaded = there_and_back({"state_dict": {}, "optimizer_states": [copy.deepcopy(nested), {}]}, tmp_path)
    assert_equal(loaded["optimizer_states"], [nested, {}])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tensors_in_lists_of_an_optimizers_state_are_written_like_others(tmp_path):
    """Rank 0 alone writes common.pt, while training waits."""
    nested = {"factors": [torch.ones(3, 3), (torch.zeros(2), None)], "rows": [[torch.ones(2)], {"a": [torch.ones(1)]}]}
    state = {"optimizer_states": [{"state": {0: nested}, "param_groups": [{"params": [0]}]}], "state_dict": {}}
    names = {"optimizer_names": [{0: "w"}]}
    taken = take(state, **names)
    keys = ["factors.0", "factors.1.0", "rows.0.0", "rows.1.a.0"]
    assert list(taken.tensors) == [f"optimizer.0.state.w.{key}" for key in keys]
    assert_equal(there_and_back(copy.deepcopy(state), tmp_path, **names), state)
    stock = {"optimizer": {"0": {"state": {"w": {"rows": [[torch.zeros(2)], {"a": [torch.zeros(1)]}]}}}}}
    dcp_load(stock, checkpoint_id=tmp_path / "a" / "weights", no_dist=True)
    assert_equal(stock["optimizer"]["0"]["state"]["w"]["rows"], nested["rows"])


def test_a_checkpoint_of_earlier_code_is_read():
    """Tensors in lists were in common.pt, arrays of records were lists of tuples."""
    found = load_checkpoint(FIXTURES / "checkpoints" / "step=7")
    assert found["global_step"] == 7
    assert_equal(found["state_dict"], {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)})
    first = {"step": torch.tensor(7.0), "factors": [torch.eye(2), torch.eye(3), None], "pair": (torch.ones(2), 3)}
    assert_equal(found["optimizer_states"][0]["state"][0], first)
    mine = found["callbacks"]["Mine"]
    assert mine["array"].dtype == np.dtype(">i4")
    assert mine["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (mine["scalar"], mine["seen"], mine["buffer"]) == (np.float32(1.5), b"seen", bytearray(b"more"))
    assert mine["rows"] == [(1, 2.5), (3, 4.5)]
    averages = load_model(FIXTURES / "checkpoints" / "step=7" / "ema_weights")
    assert_equal(averages, {"w": torch.arange(6.0).reshape(2, 3) / 2, "b": torch.zeros(3)})
    assert problems(FIXTURES / "checkpoints" / "step=7") == []


def test_two_tensors_under_one_key_are_an_error():
    """Rather than one lost in silence."""
    state = {"optimizer_states": [{"state": {0: {"a": {1: torch.ones(1), "1": torch.zeros(1)}}}}]}
    with pytest.raises(CheckpointError, match=r"optimizer\.0\.state\.0\.a\.1"):
        take(state)


@pytest.mark.parametrize("value", [torch.empty(2, device="meta"), torch.nn.UninitializedParameter()])
def test_a_tensor_without_values_is_an_error_that_names_it(value):
    with pytest.raises(CheckpointError, match=r"state_dict\.lazy has no values yet"):
        take({"state_dict": {"lazy": value}})


def test_tensors_made_of_others_are_an_error_that_names_them():
    """A quantized weight is more than what it shows; left out, it would be lost, and what it shows is not what it is."""
    made = TwoTensor(torch.ones(2), torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"^state_dict\.w is a TwoTensor, a tensor made of others"):
        take({"state_dict": {"w": made}})
    state = {0: {"factors": [made]}}
    with pytest.raises(CheckpointError, match=r"optimizer\.0\.state\.w\.factors\.0 is a TwoTensor"):
        take({"state_dict": {}, "optimizer_states": [{"state": state}]}, optimizer_names=[{0: "w"}])


def test_what_is_left_out_is_named():
    taken = take({"state_dict": {}, "callbacks": {"mine": {"handle": object()}}})
    assert list(taken.left_out) == ["callbacks.mine.handle"]


def test_odd_keys_at_the_top_come_back(tmp_path):
    state = {"state_dict": {"w": torch.ones(1)}, ("a", 1): 2, Phase.WARMUP: 3, "epoch": 4}
    assert_equal(there_and_back(state, tmp_path), state)


def test_restoring_is_the_reverse_of_taking():
    state = lightning_state(5)
    taken = take(state)
    assert isinstance(taken, Snapshot)
    assert_equal(restore(taken.common, taken.tensors), state)


def test_a_checkpoint_can_be_loaded_by_its_weights_directory(tmp_path):
    save(tmp_path / "a", 3)
    assert load_checkpoint(tmp_path / "a" / "weights")["global_step"] == 3
    assert "nemologger" not in load_checkpoint(tmp_path / "a")


def test_other_weights_of_the_model_go_to_a_directory_of_their_own():
    weights, averages = (
        {"a": torch.ones(2), "b/c": torch.zeros(1), "extra": {"x": 1}},
        {"a": torch.zeros(2), "extra": {"x": 2}},
    )
    state = {"state_dict": weights, "ema_state_dict": OtherWeights(averages), "epoch": 3}
    snapshot = take(state, frozenset({"a"}))
    assert snapshot.directories == ("weights", "ema_weights")
    assert "ema_state_dict" not in snapshot.common
    tensors, paths = snapshot.within("weights")
    assert tensors.keys() == {"state_dict.a", "state_dict.b/c"}
    assert tensors["state_dict.a"] is weights["a"]
    tensors, paths = snapshot.within("ema_weights")
    assert tensors["state_dict.a"] is averages["a"]
    assert paths == {"state_dict.a": ("state_dict", "a")}
    assert snapshot.beside == {"ema_weights": {"state_dict": {"extra": {"x": 2}}}}
    assert snapshot.rank_zero == {"state_dict.b/c"}
    assert take({"state_dict": weights}).directories == ("weights",)
    assert take({"state_dict": weights}).outline(shared=True) != snapshot.outline(shared=True)


@pytest.mark.parametrize("theirs", [{"w": torch.zeros(2), "decay": 0.9}, [torch.zeros(2)], None])
def test_what_a_program_keeps_under_the_key_of_averages_is_its_own(tmp_path, theirs):
    state = {"state_dict": {"w": torch.ones(2)}, "ema_state_dict": theirs}
    assert_equal(there_and_back(state, tmp_path), state)
    assert not (tmp_path / "a" / "ema_weights").exists()


def test_in_a_file_of_torch_other_weights_are_a_plain_dictionary(tmp_path):
    torch.save({"ema_state_dict": OtherWeights(w=torch.ones(2))}, tmp_path / "x")
    assert_equal(dict(torch.load(tmp_path / "x", weights_only=True)["ema_state_dict"]), {"w": torch.ones(2)})
