"""Restarts that would find what the ranks before them have left in the store."""

from __future__ import annotations

import pytest

from nemologger.ranks import why_restarts_may_hang

STARTED = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    ("world_size", "told", "said"),
    [
        (2, STARTED, True),
        (1, STARTED, False),
        (2, {}, False),
        (2, {**STARTED, "TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        (2, {**STARTED, "TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
    ],
)
def test_restarts_with_the_store_of_those_before_are_warned_of(world_size, told, said):
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in why_restarts_may_hang(world_size, told)) is said
