"""What a rank adds to a checkpoint is one row of bytes, and comes back as it was, without any code of it being run."""

from __future__ import annotations

import os
import threading
import zlib
from datetime import timedelta

import pytest
import torch

from nemologger.callbacks.packed import pack, unpack
from nemologger.checkpoint.weights import dump_common
from nemologger.errors import DamagedCheckpointError, RefusedError
from nemologger.exact.rng import RngState


def test_it_comes_back_as_it_was():
    added = {"rng": torch.arange(9), "positions": [{"batches": 3, "state": (1, b"", timedelta(2))}], "buffers": {}}
    found = unpack(pack(added, print))
    assert torch.equal(found.pop("rng"), added.pop("rng"))
    assert found == added
    assert unpack(added) is added  # of one rank, or from before they were packed


def test_what_has_no_plain_form_is_named():
    said = {}
    found = unpack(pack({"state": {"lock": threading.Lock(), "next": 4}}, said.__setitem__))
    assert found == {"state": {"lock": None, "next": 4}}
    assert said == {"state.lock": "is not saved: a _thread.lock has no plain form"}


class _Runs:
    def __reduce__(self):
        return os.getpid, ()


def test_nothing_of_it_is_run():
    with pytest.raises(RefusedError, match=r"what a rank has added .* holds more than plain types"):
        unpack(dump_common({"state": _Runs()}))
    with pytest.raises(DamagedCheckpointError, match="what a rank has added"):
        unpack(pack({"state": 1}, print)[:-30])


def test_it_takes_less_than_half_the_room_of_what_generators_hold():
    states = {"rng": RngState.capture().to_plain(), "start": RngState.capture().to_plain()}
    packed = pack(states, print)
    assert len(packed) < 0.5 * len(dump_common(states))
    assert torch.equal(unpack(packed)["start"]["torch"], torch.get_rng_state())


def test_large_buffers_are_packed_as_they_are():
    """Of a buffer of samples 200 MB took 16 seconds, in which training waits."""
    added = {"buffer": torch.randn(1 << 18), "next": 4}
    packed = pack(added, print)
    assert packed == dump_common(added)
    assert torch.equal(unpack(packed)["buffer"], added["buffer"])


def test_what_older_versions_have_packed_is_read():
    assert unpack(dump_common({"next": 4})) == {"next": 4}


def test_what_would_take_all_memory_is_damaged_and_what_is_all_zeros_is_not():
    zeros = torch.zeros(1 << 17)
    assert torch.equal(unpack(pack({"mask": zeros}, print))["mask"], zeros)
    with pytest.raises(DamagedCheckpointError, match="more than 100 times as long as it is written"):
        unpack(zlib.compress(bytes(1 << 22)))
