"""Any block of a tensor is read out of any other blocks that it was written in; ranks share out what they all hold."""

from __future__ import annotations

import math
from itertools import pairwise, product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemologger import names
from nemologger.checkpoint.reading.overlaps import Block, is_one_run
from nemologger.checkpoint.reading.read import read_blocks
from nemologger.checkpoint.state.shards import part_of
from nemologger.checkpoint.state.shares import Part, Piece, Shape, share_of
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.weights import entries, lay_out, metadata
from nemologger.checkpoint.writing.write import write_share
from nemologger.disk import LocalDisk


@st.composite
def grids(draw):
    """A tensor's sizes, where each dimension was cut, and the block that is wanted."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in sizes]
    begin = [draw(st.integers(0, size)) for size in sizes]
    end = [draw(st.integers(first, size)) for first, size in zip(begin, sizes, strict=True)]
    return tuple(sizes), cuts, tuple(begin), tuple(end)


@settings(max_examples=150, deadline=None)
@given(grid=grids(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64]))
def test_a_block_is_read_from_whatever_blocks_were_written(tmp_path_factory, grid, dtype):
    sizes, cuts, begin, end = grid
    whole = torch.arange(math.prod(sizes)).reshape(sizes).to(dtype)
    key = "state_dict.t"
    pieces = [
        Piece(
            key,
            tuple(a for a, _ in cell),
            tuple(b - a for a, b in cell),
            math.prod(b - a for a, b in cell) * dtype.itemsize,
        )
        for cell in product(*(list(pairwise(at)) for at in cuts))
    ]
    snapshot = take({"state_dict": {"t": whole}})
    weights = tmp_path_factory.mktemp("weights")
    files = {names.shard(0, i): lay_out(group, snapshot.tensors) for i, group in enumerate((pieces[::2], pieces[1::2]))}
    write_share(LocalDisk(), weights, files, lambda piece: part_of(whole, piece))
    stored = [entry for name, places in files.items() for entry in entries(name, places)]
    (weights / names.DCP_METADATA).write_bytes(metadata(snapshot.tensors, snapshot.paths, stored))
    wanted = whole[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]
    block = Block(torch.empty_like(wanted, memory_format=torch.contiguous_format), begin)
    read_blocks(weights, {key: block})
    assert torch.equal(block.memory, wanted)


@given(st.data())
def test_one_run_is_one_run(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    part = tuple(data.draw(st.integers(1, size)) for size in sizes)
    places = torch.arange(math.prod(sizes)).reshape(sizes)[tuple(slice(0, size) for size in part)].flatten().tolist()
    assert is_one_run(sizes, part) == (places == list(range(len(places))))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), data_ranks=st.integers(1, 4), tensor_ranks=st.integers(1, 3))
def test_ranks_that_hold_the_same_part_write_it_once_together(data, data_ranks, tensor_ranks):
    """A mesh of ranks: some tensors on all, some split over its columns, some over both."""
    world = data_ranks * tensor_ranks
    tensors = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["all", "columns", "both"]), st.integers(0, 9), st.integers(1, 3)), max_size=5
        )
    )
    written: dict[str, list[tuple[int, ...]]] = {f"t{i}": [] for i in range(len(tensors))}
    for rank in range(world):
        column = rank % tensor_ranks
        parts = {}
        for i, (kind, length, width) in enumerate(tensors):
            over = {"all": 1, "columns": tensor_ranks, "both": world}[kind]
            at = {"all": 0, "columns": column, "both": rank}[kind]
            each = -(-length // over)
            first, end = min(at * each, length), min((at + 1) * each, length)
            holders = {
                "all": None,
                "columns": tuple(row * tensor_ranks + column for row in range(data_ranks)),
                "both": (rank,),
            }[kind]
            parts[f"t{i}"] = Part(Shape((end - first, width), 4), (first, 0), holders)
        for piece in share_of(rank, world, parts, frozenset()):
            own = parts[piece.key]
            assert own.offsets[0] <= piece.offsets[0]
            assert piece.offsets[0] + piece.sizes[0] <= own.offsets[0] + own.shape.sizes[0]
            written[piece.key] += product(*(range(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True)))
    for i, (_, length, width) in enumerate(tensors):
        assert sorted(written[f"t{i}"]) == list(product(range(length), range(width)))
