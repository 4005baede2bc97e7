"""Who writes what: every byte once, about as many for each rank, always the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemologger.checkpoint.state.shares import Piece, Shape, into_files, share_out

shape = st.builds(Shape, st.lists(st.integers(0, 6), max_size=3).map(tuple), st.sampled_from([1, 2, 4, 8, 16]))
shapes = st.lists(shape, max_size=8).map(lambda found: {f"t{i}": one for i, one in enumerate(found)})
worlds = st.integers(1, 9)


@st.composite
def states(draw):
    held = draw(shapes)
    return held, frozenset(draw(st.sets(st.sampled_from(sorted(held)), max_size=3))) if held else frozenset()


def _elements(shape: Shape, piece: Piece) -> np.ndarray:
    """The places of a piece's elements in the tensor's memory."""
    places = np.arange(int(np.prod(shape.sizes, dtype=int))).reshape(shape.sizes)
    return places[tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))].reshape(-1)


@settings(max_examples=300, deadline=None)
@given(states(), worlds)
def test_every_byte_is_written_once_in_contiguous_pieces(state, world):
    held, rank_zero = state
    shares = share_out(held, rank_zero, world)
    assert len(shares) == world
    written: dict[str, list[int]] = {key: [] for key in held}
    for pieces in shares:
        for piece in pieces:
            places = _elements(held[piece.key], piece)
            assert list(places) == list(range(places[0], places[0] + len(places))) if len(places) else True
            assert piece.nbytes == len(places) * held[piece.key].itemsize
            written[piece.key].extend(places)
    for key, one in held.items():
        assert sorted(written[key]) == list(range(int(np.prod(one.sizes, dtype=int))))


@settings(max_examples=200, deadline=None)
@given(states(), worlds)
def test_an_empty_tensor_has_one_piece_too(state, world):
    """Its shape must be in the metadata."""
    held, rank_zero = state
    pieces = [piece.key for share in share_out(held, rank_zero, world) for piece in share]
    for key, one in held.items():
        if one.nbytes == 0:
            assert pieces.count(key) == 1


@settings(max_examples=100, deadline=None)
@given(states(), worlds)
def test_what_is_rank_zeros_own_is_written_by_rank_zero_alone(state, world):
    held, rank_zero = state
    for rank, pieces in enumerate(share_out(held, rank_zero, world)):
        for piece in pieces:
            if piece.key in rank_zero:
                assert rank == 0
                assert piece.sizes == held[piece.key].sizes


@settings(max_examples=100, deadline=None)
@given(states(), worlds, st.lists(shapes, min_size=9, max_size=9))
def test_other_ranks_may_have_others_of_rank_zeros_tensors(state, world, own):
    """They need not know which it has, only their bytes."""
    held, rank_zero = state
    reserved = sum(held[key].nbytes for key in rank_zero)
    shared = {key: one for key, one in held.items() if key not in rank_zero}
    for rank in range(1, world):
        others = {f"own {key}": one for key, one in own[rank].items()}
        found = share_out({**others, **shared}, frozenset(others), world, reserved)[rank]
        assert found == share_out(held, rank_zero, world)[rank]


@settings(max_examples=100, deadline=None)
@given(states(), worlds)
def test_the_decision_is_the_same_every_time(state, world):
    held, rank_zero = state
    assert share_out(held, rank_zero, world) == share_out(dict(held), frozenset(rank_zero), world)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(200, 5000), st.integers(1, 20), st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=8
    ),
    worlds,
)
def test_ranks_are_balanced_within_ten_percent_where_rows_are_fine_enough(found, world):
    held = {f"t{i}": Shape((rows, columns), item) for i, (rows, columns, item) in enumerate(found)}
    total = sum(one.nbytes for one in held.values())
    coarsest = max(columns * item for _, columns, item in found)
    written = [sum(piece.nbytes for piece in pieces) for pieces in share_out(held, frozenset(), world)]
    assert max(abs(one - total / world) for one in written) <= max(0.1 * total / world, coarsest)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_model_is_balanced_within_ten_percent(world):
    """A small transformer and Adam's state, with buffers that only rank 0 writes."""
    held = {"embedding": Shape((256, 64), 4), "buffer": Shape((64,), 8)}
    for layer in range(4):
        held.update({f"{layer}.w{i}": Shape((64, 256), 4) for i in range(6)}, **{f"{layer}.b": Shape((64,), 4)})
        held[f"{layer}.step"] = Shape((), 4)
    written = [sum(piece.nbytes for piece in pieces) for pieces in share_out(held, frozenset({"buffer"}), world)]
    assert max(written) <= 1.1 * min(written)


def test_at_most_one_tensor_is_split_at_each_cut():
    held = {f"t{i}": Shape((10, 10), 4) for i in range(100)}
    pieces = [piece.key for share in share_out(held, frozenset(), 8) for piece in share]
    assert sum(pieces.count(key) > 1 for key in held) <= 7


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(1, 5))
def test_files_hold_every_piece_once_and_none_is_empty(sizes, count):
    pieces = [Piece(f"t{i}", (0,), (size,), size) for i, size in enumerate(sizes)]
    files = into_files(pieces, count)
    assert len(files) <= count
    assert all(files)
    assert sorted((piece for file in files for piece in file), key=lambda p: p.key) == sorted(
        pieces, key=lambda p: p.key
    )
    if pieces:
        totals = [sum(piece.nbytes for piece in file) for file in files]
        assert max(totals) <= sum(sizes) / count + max(sizes)
