"""Reading straight into a module gives what loading a state dictionary gives, whatever the module is like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.reading.in_place import loaded_otherwise, places_of
from nemologger.checkpoint.reading.load import load_model, load_parts, open_checkpoint
from nemologger.checkpoint.state import snapshot
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import LocalDisk
from nemologger.errors import DamagedCheckpointError, ModelMismatchError
from nemologger.ranks import SingleProcess


def _save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    Saver(LocalDisk(), SingleProcess()).save(snapshot.take({"state_dict": state}), path, Manifest(step=1, epoch=0))
    return path


def _plain() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.PReLU())
    module.register_buffer("table", torch.zeros(2, 2, dtype=torch.complex64))
    module.register_buffer("mask", torch.zeros(5, dtype=torch.bool))
    module.register_buffer("empty", torch.zeros(0, 3))
    module[0].weight.requires_grad_(False)
    return module


def _tied() -> nn.Module:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    module["c"] = module["a"]
    return module


def _tied_in_two_dtypes() -> nn.Module:
    """What is stored for one of the names is of another dtype, so that it has to be copied."""
    return _tied()


def _views() -> nn.Module:
    """Parameters that overlap: what is copied last wins where they do."""
    flat = torch.zeros(10)
    module = nn.Module()
    module.first, module.second = nn.Parameter(flat[:6]), nn.Parameter(flat[4:])
    module.register_buffer("apart", flat.new_zeros(20)[5:15])
    module.register_buffer("every_other", torch.zeros(20)[::2])
    return module


def _spread() -> nn.Module:
    module = nn.Module()
    module.register_buffer("expanded", torch.zeros(1).expand(4))  # loading it is an error of torch's
    module.register_buffer("plain", torch.zeros(4))
    return module


def _transposed() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(2, 3, 2)).to(memory_format=torch.channels_last)
    module.register_buffer("t", torch.zeros(3, 2).t())
    return module


def _half() -> nn.Module:
    return _plain().to(torch.float16)


def _parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), parametrizations.orthogonal(nn.Linear(3, 3)))


class _Swaps(nn.Module):
    """Its hook exchanges two tensors: reading both in place would make them equal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.register_load_state_dict_pre_hook(self._swap)

    @staticmethod
    def _swap(module, state, prefix, *args):
        state[f"{prefix}a"], state[f"{prefix}b"] = state[f"{prefix}b"], state[f"{prefix}a"]


class _Doubles(nn.Linear):
    """Its own way to load changes what it is given, in place."""

    def _load_from_state_dict(self, state, prefix, *args, **kwargs):
        state[f"{prefix}weight"].mul_(2)
        super()._load_from_state_dict(state, prefix, *args, **kwargs)


class _LoadsTransposed(nn.Sequential):
    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict({key: value.t() for key, value in state.items()}, strict, assign)


class _ShowsCopies(nn.Linear):
    """Its state dictionary holds copies, one of them under the name of the other."""

    def state_dict(self, *args, **kwargs):
        return {key: value.clone() for key, value in super().state_dict(*args, **kwargs).items()}


MODULES = {
    "plain": _plain,
    "tied": _tied,
    "tied in two dtypes": _tied_in_two_dtypes,
    "views": _views,
    "transposed": _transposed,
    "half": _half,
    "parametrized": _parametrized,
    "swaps": lambda: nn.Sequential(_Swaps(), nn.Linear(2, 2)),
    "doubles": lambda: nn.Sequential(_Doubles(2, 3), nn.Linear(2, 2)),
    "loads transposed": lambda: _LoadsTransposed(nn.Linear(3, 3, bias=False), nn.Linear(2, 2, bias=False)),
    "shows copies": lambda: _ShowsCopies(2, 3),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "recurrent": lambda: nn.LSTM(3, 4, 2),
}

# Of these, so many tensors go into place.
IN_PLACE = {
    "plain": 10,
    "tied": 6,
    "tied in two dtypes": 3,
    "views": 1,
    "transposed": 1,
    "half": 2,
    "swaps": 0,
    "doubles": 0,
    "loads transposed": 0,
    "shows copies": 0,
    "attention": 12,
    "recurrent": 8,
}


def _random_state(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Other values under each name, also where names share memory."""
    torch.manual_seed(3)
    state = {}
    for key, value in module.state_dict().items():
        dtype = torch.float32 if value.dtype == torch.float16 else value.dtype
        random = torch.randint(0, 2, value.shape).bool() if dtype == torch.bool else torch.randn(value.shape) * 9
        state[key] = random.to(dtype)
    if name == "tied in two dtypes":
        state["b.weight"] = state["b.weight"].double()
    return state


@pytest.mark.parametrize("name", MODULES)
def test_the_same_as_loading_a_copy(tmp_path, name):
    path = _save(tmp_path / "x", _random_state(name, MODULES[name]()))
    expected, module = MODULES[name](), MODULES[name]()
    expected.load_state_dict(load_model(path))
    flags = [(p.requires_grad, p.data_ptr()) for p in module.parameters()]
    loaded = load_model(path, into=places_of(module))
    module.load_state_dict(loaded)
    assert flags == [(p.requires_grad, p.data_ptr()) for p in module.parameters()]
    one, other = expected.state_dict(), module.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    own = {value.data_ptr() for value in nn.Module.state_dict(module).values() if value.numel()}
    if name in IN_PLACE:
        assert sum(value.data_ptr() in own for value in loaded.values()) == IN_PLACE[name]


def test_what_torch_cannot_load_is_still_its_error(tmp_path):
    path = _save(tmp_path / "x", {"expanded": torch.ones(4), "plain": torch.ones(4)})
    module = _spread()
    loaded = load_model(path, into=places_of(module))
    with pytest.raises(RuntimeError, match="single memory location"):
        module.load_state_dict(loaded)


def test_tensors_of_inference_mode_are_left_to_torch(tmp_path):
    path = _save(tmp_path / "x", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    with torch.inference_mode():
        module = nn.Linear(2, 2)
    before = module.weight.clone()
    loaded = load_model(path, into=places_of(module))
    assert torch.equal(module.weight, before)
    with torch.inference_mode():
        module.load_state_dict(loaded)
    assert torch.equal(module.weight, torch.ones(2, 2))


class _Special(nn.Parameter):
    """Of a kind of its own, as those of quantization are."""


def test_parameters_of_a_kind_of_their_own_are_left_to_torch(tmp_path):
    path = _save(tmp_path / "x", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    module = nn.Linear(2, 2)
    module.weight = _Special(module.weight.detach())
    loaded = load_model(path, into=places_of(module))
    assert not {value.data_ptr() for value in loaded.values()} & {p.data_ptr() for p in module.parameters()}


def test_torch_swapping_parameters_is_left_to_torch(tmp_path):
    path = _save(tmp_path / "x", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    module = nn.Linear(2, 2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert not {v.data_ptr() for v in load_model(path, into=places_of(module)).values()} & {
            p.data_ptr() for p in module.parameters()
        }
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_nothing_of_a_file_that_is_missing_or_too_short_is_loaded(tmp_path):
    path = _save(tmp_path / "x", {"weight": torch.ones(40, 50), "bias": torch.ones(40)})
    for file in sorted((path / "weights").glob("*.distcp")):
        content = file.read_bytes()
        for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-9000])):
            damage(file)
            module = nn.Linear(50, 40)
            before = [parameter.clone() for parameter in module.parameters()]
            with pytest.raises(DamagedCheckpointError, match=file.name):
                open_checkpoint(path).read(into=module)
            assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
            file.write_bytes(content)
    module = nn.Linear(50, 40)
    open_checkpoint(path).read(into=module)
    assert torch.equal(module.weight, torch.ones(40, 50))


def test_parts_for_tensors_of_which_some_fit(tmp_path):
    path = _save(tmp_path / "x", {"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(2), "d": torch.ones(2)})
    own = {"a": torch.zeros(3), "c": torch.zeros(2, dtype=torch.float64), "e": torch.zeros(2)}
    loaded = load_parts(path, own)
    assert loaded.keys() == {"a", "c"}
    assert [loaded[key].data_ptr() == own[key].data_ptr() for key in "ac"] == [True, False]
    assert torch.equal(own["a"], torch.ones(3))
    assert not own["c"].any()
    with pytest.raises(ModelMismatchError, match=r"b has shape \(4,\)"):
        load_parts(path, {**own, "b": torch.zeros(5)})


def test_parts_with_a_way_of_their_own_are_known_by_their_keys():
    class Own(nn.Module):
        def load_state_dict(self, *args, **kwargs):
            return super().load_state_dict(*args, **kwargs)

    class Other(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)

    assert loaded_otherwise(_plain()) == []
    assert loaded_otherwise(checkpoint_wrapper(_plain())) == []  # it sees to names, and to nothing else
    assert loaded_otherwise(Own()) == [""]
    other = Other(1, 1)
    module = nn.ModuleDict({"a": other, "b": nn.Sequential(nn.Linear(1, 1), other), "c": nn.LazyLinear(1)})
    module["d"] = parametrizations.weight_norm(nn.Linear(1, 1))
    assert loaded_otherwise(module) == ["a.", "b.1.", "c.", "d."]
