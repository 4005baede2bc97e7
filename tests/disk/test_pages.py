"""Memory that is shared, touched, joined and given back."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from nemologger.disk.pages import LARGE, SharedPages, own_pages


def _maps() -> int:
    return sum("nemologger-test" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def descriptor():
    descriptor = os.memfd_create("nemologger-test")
    os.ftruncate(descriptor, 3 * LARGE + 8192)
    yield descriptor
    os.close(descriptor)


def test_two_mappings_see_the_same_before_and_after_the_pages_are_joined(descriptor):
    size = 3 * LARGE + 8192
    one, other = SharedPages(descriptor, size), SharedPages(descriptor, size)
    assert one.address % LARGE == other.address % LARGE == 0
    one.touch()
    content = torch.randint(0, 255, (size,), dtype=torch.uint8)
    torch.frombuffer(one.view, dtype=torch.uint8).copy_(content)
    assert one.enlarge(lambda: True) in range(0, 3 * LARGE + 1, LARGE)  # none before Linux 6.1
    assert torch.equal(torch.frombuffer(other.view, dtype=torch.uint8), content)
    other.view[5] = content[5] ^ 1
    assert one.view[5] == content[5] ^ 1


def test_joining_stops_when_it_is_told(descriptor):
    pages = SharedPages(descriptor, 3 * LARGE)
    pages.touch()
    assert pages.enlarge(lambda: False) == 0


def test_it_stays_as_long_as_somebody_looks_at_it(descriptor):
    tensor = torch.frombuffer(SharedPages(descriptor, LARGE).view, dtype=torch.uint8)
    gc.collect()
    assert _maps() == 1
    tensor.fill_(7)
    del tensor
    gc.collect()
    assert _maps() == 0


def test_what_cannot_be_mapped_is_an_error_and_leaves_nothing(descriptor):
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(50):  # other threads map something now and then
        with pytest.raises(OSError, match="Bad file descriptor"):
            SharedPages(999_999, LARGE)
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before < 50


def test_own_pages_are_ordinary_memory():
    with own_pages(5000) as pages:
        pages[4999] = 3
        assert (pages[0], pages[4999], len(pages)) == (0, 3, 5000)
