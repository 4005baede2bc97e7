"""``weights/``: every tensor comes back bit for bit, and stock torch and Megatron-core can read it."""

from __future__ import annotations

import copyreg
import io
import itertools
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.engine import lightning_state, save, snapshot_of
from helpers.weights import write
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from nemologger.checkpoint.reading.load import load_model, weights_of
from nemologger.checkpoint.reading.read import read_tensors
from nemologger.checkpoint.state.shards import held
from nemologger.checkpoint.state.shares import share_out
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.weights import BACKEND, described, lay_out, read_common, read_metadata
from nemologger.checkpoint.weights.places import without
from nemologger.errors import NotFoundError

MEGATRON = Path(__file__).parents[2] / "fixtures" / "nemo2" / "megatron"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
]


def raw(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert raw(found) == raw(wanted)


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {}
    for dtype in DTYPES:
        item = torch.empty((), dtype=dtype).element_size()
        noise = torch.randint(0, 2 if dtype == torch.bool else 256, (4 * 6 * item,), generator=generator).to(
            torch.uint8
        )
        state[str(dtype)] = noise.view(dtype).reshape(4, 6)
    return state


def every_shape() -> dict[str, torch.Tensor]:
    base = torch.arange(5000.0)
    return {
        "scalar": torch.tensor(3.5),
        "one": torch.tensor([7]),
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 3, dtype=torch.int64),
        "empty columns": torch.empty(3, 0),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "strided": base[::7],
        "view": base[10:20],
        "one of a column": torch.arange(8.0).reshape(4, 2)[:, 1][:1],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "channels last": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "just under a page": torch.arange(1023.0),
        "a page": torch.arange(1024.0),
        "over a page": base,
        "wide": torch.arange(5000.0).reshape(1, 5000),
        "needs grad": torch.nn.Parameter(torch.arange(4.0)),
    }


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("make", [every_dtype, every_shape])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, make, world):
    state = make()
    found = read_tensors(write(tmp_path / "weights", state, world=world))
    assert found.keys() == {f"state_dict.{key}" for key in state}
    for key, tensor in state.items():
        assert_same(found[f"state_dict.{key}"], tensor)


def test_nan_keeps_its_bits(tmp_path):
    odd = torch.tensor([0x7FC00001, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    found = read_tensors(write(tmp_path / "weights", {"odd": odd}))
    assert_same(found["state_dict.odd"], odd)


@pytest.mark.parametrize("make", [every_dtype, every_shape])
def test_stock_torch_reads_it(tmp_path, make):
    """``torch.distributed.checkpoint.load``, with flat and with nested keys."""
    weights = write(tmp_path / "weights", make(), world=2)
    flat = {f"state_dict.{k}": torch.empty(v.shape, dtype=v.dtype) for k, v in make().items()}
    dcp.load(flat, checkpoint_id=weights, no_dist=True)
    nested = {"state_dict": {k: torch.empty(v.shape, dtype=v.dtype) for k, v in make().items()}}
    dcp.load(nested, checkpoint_id=weights, no_dist=True)
    for key, tensor in make().items():
        assert_same(flat[f"state_dict.{key}"], tensor)
        assert_same(nested["state_dict"][key], tensor)


def test_stock_torch_reads_the_optimizer_too(tmp_path):
    save(tmp_path / "a", 7)
    wanted = snapshot_of(7)
    state = {key: torch.zeros_like(tensor) for key, tensor in wanted.tensors.items()}
    assert "optimizer.0.state.layer.weight.exp_avg" in state
    dcp.load(state, checkpoint_id=tmp_path / "a" / "weights", no_dist=True)
    for key, tensor in wanted.tensors.items():
        assert_same(state[key], tensor)


class _OldProperties:
    """Takes what ``TensorProperties`` of torch 2.10 to 2.14 takes."""

    def __setstate__(self, state):
        self.dtype, self.layout, self.requires_grad, self.memory_format, self.pin_memory = state


class _OldTorch(pickle.Unpickler):
    def find_class(self, module, name):
        return _OldProperties if name == "TensorProperties" else super().find_class(module, name)


def test_torch_before_2_15_reads_what_a_later_one_has_written(tmp_path):
    """A run may go on with an older release."""
    write(tmp_path, {"a": torch.ones(3)})
    with (tmp_path / ".metadata").open("rb") as file:
        read = _OldTorch(file).load()
    assert read.state_dict_metadata["state_dict.a"].properties.dtype == torch.float32


@pytest.mark.parametrize("thinned", [False, True])
def test_what_dcp_of_torch_2_15_has_written_is_read_by_older_ones(tmp_path, thinned):
    """Strides are a sixth value there, which an older one does not take, and nothing reads. What we write has five."""
    write(tmp_path, {"a": torch.ones(3), "b": torch.ones(2)})
    path, file = tmp_path / ".metadata", io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.dispatch_table = copyreg.dispatch_table | {
        TensorProperties: lambda it: (copyreg.__newobj__, (TensorProperties,), (*it.__getstate__()[:5], (1,)))
    }
    pickler.dump(read_metadata(tmp_path))
    path.write_bytes(file.getvalue())
    if thinned:
        path.write_bytes(without(tmp_path, lambda key: key == "state_dict.b")[0])
        with path.open("rb") as thin:
            assert _OldTorch(thin).load().state_dict_metadata.keys() == {"state_dict.a"}
    assert type(read_metadata(tmp_path).state_dict_metadata["state_dict.a"].properties) is TensorProperties
    assert read_tensors(tmp_path)["state_dict.a"].tolist() == [1, 1, 1]


def test_sizes_may_be_plain_tuples(tmp_path):
    """As those of Megatron-FSDP's parts are."""
    write(tmp_path, {"a": torch.arange(3)})
    read = read_metadata(tmp_path)
    read.state_dict_metadata["state_dict.a"].chunks[:] = [ChunkStorageMetadata((0,), (3,))]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(read))
    assert read_tensors(tmp_path)["state_dict.a"].tolist() == [0, 1, 2]


def test_torchs_own_converter_reads_it(tmp_path):
    save(tmp_path / "a", 7)
    dcp_to_torch_save(tmp_path / "a" / "weights", tmp_path / "all.pt")
    converted = torch.load(tmp_path / "all.pt", weights_only=True)
    assert_same(converted["state_dict"]["layer.weight"], lightning_state(7)["state_dict"]["layer.weight"])
    assert_same(converted["optimizer"]["0"]["state"]["layer.weight"]["exp_avg"], torch.full((3, 4), 14.0))


def test_parameters_that_share_memory_are_both_there(tmp_path):
    shared = torch.nn.Parameter(torch.arange(6.0))
    found = read_tensors(write(tmp_path / "weights", {"embedding": shared, "head": shared, "part": shared[2:4]}))
    assert_same(found["state_dict.head"], shared)
    assert_same(found["state_dict.part"], torch.tensor([2.0, 3.0]))


def test_a_payload_of_a_page_starts_on_a_page(tmp_path):
    """So that it can be written and read past the page cache."""
    tensors = take({"state_dict": every_shape()}).tensors
    pieces = share_out({k: held(t, k).shape for k, t in tensors.items()}, frozenset(), 1)[0]
    places = lay_out(pieces, tensors)
    for place in places:
        start = place.start + len(place.header)
        assert start % (4096 if place.piece.nbytes >= 4096 else 64) == 0
    assert all(one.end <= next_.start for one, next_ in itertools.pairwise(places))


@pytest.mark.parametrize("size", [10, 1024, 100_000])
def test_what_lies_around_a_payload_does_not_depend_on_it(size):
    """Else it could not be made once and reused for every save."""
    around = set()
    for fill in (0.0, 1.0, float("nan")):
        tensor = torch.full((size,), fill)
        (place,) = lay_out(share_out({"t": held(tensor, "t").shape}, frozenset(), 1)[0], {"t": tensor})
        archive = place.header + raw(tensor) + place.trailer
        assert torch.equal(torch.load(io.BytesIO(archive), weights_only=True).nan_to_num(), tensor.nan_to_num())
        around.add((place.header, place.trailer))
    assert len(around) == 1


def test_torchs_setting_for_checksums_is_left_alone(tmp_path):
    before = torch.serialization.get_crc32_options()
    write(tmp_path / "weights", {"t": torch.ones(17, 3)})
    assert torch.serialization.get_crc32_options() is before is True


def test_every_archive_is_a_whole_zip(tmp_path):
    """What others may use to look inside."""
    save(tmp_path / "a", 1)
    weights = tmp_path / "a" / "weights"
    for info in read_metadata(weights).storage_data.values():
        content = (weights / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert any(name.endswith("data/0") for name in zipfile.ZipFile(io.BytesIO(content)).namelist())


# --- the rules for Megatron-core --------------------------------------------------------------------------------------


def test_metadata_json_has_exactly_the_four_keys(tmp_path):
    save(tmp_path / "a", 1)
    assert json.loads((tmp_path / "a" / "weights" / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    theirs = json.loads((MEGATRON / "o1_sync" / "metadata.json").read_text())
    assert json.loads(BACKEND) == theirs


def test_common_pt_loads_without_trust(tmp_path):
    save(tmp_path / "a", 1)
    common = torch.load(tmp_path / "a" / "weights" / "common.pt", weights_only=True)
    assert common["global_step"] == 1


def test_no_key_of_common_pt_is_the_key_of_a_tensor(tmp_path):
    save(tmp_path / "a", 1)
    weights = tmp_path / "a" / "weights"
    assert not set(read_common(weights)) & set(described(weights))


def test_distcp_files_hold_tensors_only(tmp_path):
    save(tmp_path / "a", 1)
    weights = tmp_path / "a" / "weights"
    read = read_metadata(weights)
    assert all(isinstance(entry, TensorStorageMetadata) for entry in read.state_dict_metadata.values())
    for index, info in read.storage_data.items():
        content = (weights / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert isinstance(torch.load(io.BytesIO(content), weights_only=True), torch.Tensor), index


def test_two_files_per_rank_named_as_megatron_names_them(tmp_path):
    save(tmp_path / "a", 1)
    files = {path.name for path in (tmp_path / "a" / "weights").iterdir()}
    assert files == {".metadata", "metadata.json", "common.pt", "__0_0.distcp", "__0_1.distcp"}
    theirs = {path.name for path in (MEGATRON / "o1_sync").iterdir()}
    assert files == theirs


# --- what others wrote ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o1_sync", "o2_sync", "gpt_2layer_weights"])
def test_what_megatron_wrote_is_read(name):
    """Its ``.metadata`` names a class of Megatron-core, which need not be there."""
    shapes = described(MEGATRON / name)
    tensors = read_tensors(MEGATRON / name)
    assert tensors.keys() == shapes.keys()
    assert tensors
    for key, tensor in tensors.items():
        assert (tuple(tensor.shape), tensor.dtype) == shapes[key]
        if tensor.is_floating_point():
            assert torch.isfinite(tensor.float()).all()


def test_megatrons_values_do_not_depend_on_its_ranks():
    one, two = read_tensors(MEGATRON / "o1_sync"), read_tensors(MEGATRON / "o2_sync")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert_same(two[key], tensor)


def test_what_stock_torch_wrote_is_read(tmp_path):
    state = {"state_dict": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "weights", no_dist=True)
    assert_same(read_tensors(tmp_path / "weights")["state_dict.w"], state["state_dict"]["w"])


def test_only_what_is_wanted_is_read(tmp_path):
    save(tmp_path / "a", 3)
    model = load_model(tmp_path / "a")
    assert set(model) == {"layer.weight", "layer.bias", "count"}
    assert torch.equal(model["layer.weight"], torch.full((3, 4), 3.0))


def test_a_directory_without_weights_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="holds no weights"):
        weights_of(tmp_path)
    save(tmp_path / "a", 3)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "a" / "weights") == tmp_path / "a" / "weights"
