"""The releases that all of this was tried with."""

from __future__ import annotations

import torch


def test_torch_is_a_version_that_was_tried():
    major, minor = map(int, torch.__version__.split(".")[:2])
    assert (2, 10) <= (major, minor) < (2, 16)
