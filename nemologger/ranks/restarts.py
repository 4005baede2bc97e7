"""What torchrun's restarts need, as far as it tells its ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping

_MAX_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"
_SHARED_STORE = "TORCHELASTIC_USE_AGENT_STORE"


def why_restarts_may_hang(world_size: int, told: Mapping[str, str] = os.environ) -> str:
    """What is to be said of restarts that would find what the ranks before them have left in the store; "" for nothing.

    torch gives each restart the same store, and gloo and NCCL look in it for where the others are.

    Args:
        world_size: A process alone looks for nobody.
        told: The environment.
    """
    if world_size == 1 or told.get(_SHARED_STORE) != "True" or told.get(_MAX_RESTARTS, "0") == "0":
        return ""
    return (
        "torchrun keeps one store for all restarts, where restarted ranks may find the addresses of those that are gone, "
        "and wait for them: start it with --standalone or --rdzv-backend=c10d, and with "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
    )
